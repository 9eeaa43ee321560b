#![allow(dead_code)] // Not every test uses all of it.

pub(crate) mod rabbit;
pub(crate) mod stack;
