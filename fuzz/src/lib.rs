//! What all targets have in common: how much memory a parser may take.

use std::alloc::System;

use cap::Cap;

/// What a parser may take of memory for what is always the same, such as tables that it makes once.
const BYTES_BASE: usize = 16 << 20;
/// And for each byte that it reads: a value of JSON that is one digit takes some tens.
const BYTES_PER_BYTE_MAX: usize = 512;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// Calls the target, which must do with memory in proportion to its input: one that wants more is ended.
pub fn within_bounds(data: &[u8], target: fn(&[u8])) {
    let limit = MEMORY.allocated() + BYTES_BASE + data.len() * BYTES_PER_BYTE_MAX;
    MEMORY.set_limit(limit).expect("more than what is there");
    target(data);
    MEMORY.set_limit(usize::MAX).expect("no limit");
}
