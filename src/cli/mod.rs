//! The command line: what people write, and what they get to read.

pub mod args;
pub mod render;
