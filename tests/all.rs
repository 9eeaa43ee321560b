//! All tests as one program: what they share is built once, and the program is linked once and not thirty times, which was
//! most of the time and of the disk that building them took. `cargo nextest run` runs each test as a process of its own.
//!
//! `-E 'test(worker::)'` picks those of one module. Those that need Ceph are there with the feature `ceph` alone; so are
//! those with Cinder's drivers for objects, as Cinder and a gateway are there for the tests with all features.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

mod bad_input;
#[cfg(feature = "ceph")]
mod brick;
mod broker;
#[cfg(feature = "ceph")]
mod ceph;
#[cfg(feature = "ceph")]
mod chaos;
mod cinder_conf;
mod cinder_database;
mod cinder_fixtures;
mod config;
mod contracts;
mod damage;
#[cfg(feature = "ceph")]
mod encrypted;
mod export_record;
mod faults;
mod gc;
mod gcs;
#[cfg(feature = "ceph")]
mod images;
#[cfg(feature = "ceph")]
mod interop_ceph;
#[cfg(feature = "ceph")]
mod interop_objects;
mod interop_posix;
mod interrupted;
mod life_model;
mod machine;
mod model;
mod nfs;
#[cfg(feature = "ceph")]
mod openstack;
#[cfg(feature = "ceph")]
mod openstack_bugs;
#[cfg(feature = "ceph")]
mod openstack_http;
#[cfg(feature = "ceph")]
mod openstack_shares;
#[cfg(feature = "ceph")]
mod openstack_states;
mod oslo;
mod oslo_calls;
mod pace;
#[cfg(feature = "ceph")]
mod rbd;
#[cfg(feature = "ceph")]
mod rbd_to_chunked;
mod resume;
mod runner;
mod s3;
mod stopping;
mod stores;
mod swift;
mod terminal;
mod tidy;
mod two_workers;
mod wire;
mod worker;
#[cfg(feature = "ceph")]
mod worker_rbd;
