#![cfg_attr(not(feature = "ceph"), allow(dead_code))] // Some of it only tests with Ceph use.

#[cfg(feature = "ceph")]
pub(crate) mod barbican;
#[cfg(feature = "ceph")]
pub(crate) mod ceph;
pub(crate) mod chain;
pub(crate) mod cinder;
#[cfg(feature = "ceph")]
pub(crate) mod content;
pub(crate) mod device;
pub(crate) mod engine;
pub(crate) mod faulty;
pub(crate) mod gcs;
pub(crate) mod link;
#[cfg(feature = "ceph")]
pub(crate) mod openstack;
pub(crate) mod oslo;
pub(crate) mod proxy;
pub(crate) mod rabbit;
pub(crate) mod s3;
pub(crate) mod share;
pub(crate) mod stack;
pub(crate) mod swift;
pub(crate) mod volume;
