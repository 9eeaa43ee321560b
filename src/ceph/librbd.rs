//! The part of librbd's C interface that is used here, as librbd 1.16 (Ceph 16) and newer have it.
//! Source: `/usr/include/rbd/librbd.h` of the package librbd-dev.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_long, c_uint, c_void};

use ::ceph::rados::rados_ioctx_t;

pub type rbd_image_t = *mut c_void;
pub type rbd_image_options_t = *mut c_void;
pub type rbd_completion_t = *mut c_void;
pub type rbd_callback_t = extern "C" fn(rbd_completion_t, *mut c_void);
pub type rbd_diff_callback_t = extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;
pub type librbd_progress_fn_t = extern "C" fn(u64, u64, *mut c_void) -> c_int;

pub const RBD_IMAGE_OPTION_FEATURES: c_int = 1;
pub const RBD_IMAGE_OPTION_STRIPE_UNIT: c_int = 3;
pub const RBD_IMAGE_OPTION_STRIPE_COUNT: c_int = 4;
pub const RBD_IMAGE_OPTION_FORMAT: c_int = 0;
pub const RBD_LOCK_MODE_EXCLUSIVE: c_int = 0;
pub const RBD_SNAP_NAMESPACE_TYPE_TRASH: c_uint = 2;

#[repr(C)]
pub struct rbd_snap_info_t {
    pub id: u64,
    pub size: u64,
    pub name: *const c_char,
}

#[repr(C)]
pub struct rbd_image_spec_t {
    pub id: *mut c_char,
    pub name: *mut c_char,
}

#[repr(C)]
pub struct rbd_image_watcher_t {
    pub addr: *mut c_char,
    pub id: i64,
    pub cookie: u64,
}

#[repr(C)]
#[derive(Default)]
pub struct timespec {
    pub tv_sec: i64,
    pub tv_nsec: c_long,
}

/// The last three fields are no longer used by librbd, which writes them all the same.
#[repr(C)]
pub struct rbd_image_info_t {
    pub size: u64,
    pub obj_size: u64,
    pub num_objs: u64,
    pub order: c_int,
    pub block_name_prefix: [c_char; 24],
    pub parent_pool: i64,
    pub parent_name: [c_char; 96],
}

#[link(name = "rbd", kind = "dylib")]
unsafe extern "C" {
    pub fn rbd_image_options_create(opts: *mut rbd_image_options_t);
    pub fn rbd_image_options_destroy(opts: rbd_image_options_t);
    pub fn rbd_image_options_set_uint64(opts: rbd_image_options_t, option: c_int, value: u64) -> c_int;

    pub fn rbd_list2(io: rados_ioctx_t, images: *mut rbd_image_spec_t, max_images: *mut usize) -> c_int;
    pub fn rbd_image_spec_list_cleanup(images: *mut rbd_image_spec_t, count: usize);
    pub fn rbd_create4(io: rados_ioctx_t, name: *const c_char, size: u64, opts: rbd_image_options_t)
    -> c_int;
    pub fn rbd_remove(io: rados_ioctx_t, name: *const c_char) -> c_int;
    pub fn rbd_rename(io: rados_ioctx_t, from: *const c_char, to: *const c_char) -> c_int;
    pub fn rbd_open(
        io: rados_ioctx_t,
        name: *const c_char,
        image: *mut rbd_image_t,
        snap_name: *const c_char,
    ) -> c_int;
    pub fn rbd_open_read_only(
        io: rados_ioctx_t,
        name: *const c_char,
        image: *mut rbd_image_t,
        snap_name: *const c_char,
    ) -> c_int;
    pub fn rbd_close(image: rbd_image_t) -> c_int;

    pub fn rbd_stat(image: rbd_image_t, info: *mut rbd_image_info_t, info_size: usize) -> c_int;
    pub fn rbd_get_id(image: rbd_image_t, id: *mut c_char, id_len: usize) -> c_int;
    pub fn rbd_get_features(image: rbd_image_t, features: *mut u64) -> c_int;
    pub fn rbd_get_modify_timestamp(image: rbd_image_t, timestamp: *mut timespec) -> c_int;
    pub fn rbd_snap_get_timestamp(image: rbd_image_t, id: u64, timestamp: *mut timespec) -> c_int;
    pub fn rbd_get_flags(image: rbd_image_t, flags: *mut u64) -> c_int;
    pub fn rbd_get_stripe_unit(image: rbd_image_t, stripe_unit: *mut u64) -> c_int;
    pub fn rbd_get_stripe_count(image: rbd_image_t, stripe_count: *mut u64) -> c_int;
    pub fn rbd_resize2(
        image: rbd_image_t,
        size: u64,
        allow_shrink: bool,
        progress: librbd_progress_fn_t,
        arg: *mut c_void,
    ) -> c_int;

    pub fn rbd_lock_acquire(image: rbd_image_t, lock_mode: c_int) -> c_int;
    pub fn rbd_lock_get_owners(
        image: rbd_image_t,
        lock_mode: *mut c_int,
        lock_owners: *mut *mut c_char,
        max_lock_owners: *mut usize,
    ) -> c_int;
    pub fn rbd_lock_get_owners_cleanup(lock_owners: *mut *mut c_char, count: usize);
    pub fn rbd_lock_break(image: rbd_image_t, lock_mode: c_int, lock_owner: *const c_char) -> c_int;
    pub fn rbd_watchers_list(
        image: rbd_image_t,
        watchers: *mut rbd_image_watcher_t,
        max_watchers: *mut usize,
    ) -> c_int;
    pub fn rbd_watchers_list_cleanup(watchers: *mut rbd_image_watcher_t, count: usize);

    pub fn rbd_snap_list(image: rbd_image_t, snaps: *mut rbd_snap_info_t, max_snaps: *mut c_int) -> c_int;
    pub fn rbd_snap_list_end(snaps: *mut rbd_snap_info_t);
    pub fn rbd_snap_create(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_remove(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_remove_by_id(image: rbd_image_t, id: u64) -> c_int;
    pub fn rbd_snap_get_namespace_type(image: rbd_image_t, id: u64, kind: *mut c_uint) -> c_int;
    pub fn rbd_snap_get_trash_namespace(
        image: rbd_image_t,
        id: u64,
        original_name: *mut c_char,
        max_length: usize,
    ) -> c_int;

    pub fn rbd_metadata_get(
        image: rbd_image_t,
        key: *const c_char,
        value: *mut c_char,
        value_len: *mut usize,
    ) -> c_int;
    pub fn rbd_metadata_set(image: rbd_image_t, key: *const c_char, value: *const c_char) -> c_int;
    pub fn rbd_metadata_remove(image: rbd_image_t, key: *const c_char) -> c_int;

    pub fn rbd_diff_iterate2(
        image: rbd_image_t,
        from_snap_name: *const c_char,
        offset: u64,
        length: u64,
        include_parent: u8,
        whole_object: u8,
        callback: rbd_diff_callback_t,
        arg: *mut c_void,
    ) -> c_int;

    pub fn rbd_aio_create_completion(
        arg: *mut c_void,
        callback: rbd_callback_t,
        completion: *mut rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_get_return_value(completion: rbd_completion_t) -> isize;
    pub fn rbd_aio_release(completion: rbd_completion_t);
    pub fn rbd_aio_read(
        image: rbd_image_t,
        offset: u64,
        length: usize,
        buffer: *mut c_char,
        completion: rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_write(
        image: rbd_image_t,
        offset: u64,
        length: usize,
        buffer: *const c_char,
        completion: rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_discard(
        image: rbd_image_t,
        offset: u64,
        length: u64,
        completion: rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_write_zeroes(
        image: rbd_image_t,
        offset: u64,
        length: usize,
        completion: rbd_completion_t,
        zero_flags: c_int,
        op_flags: c_int,
    ) -> c_int;
    pub fn rbd_aio_flush(image: rbd_image_t, completion: rbd_completion_t) -> c_int;
}
