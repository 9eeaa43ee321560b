//! Gives one of the parsers in `backhaul::fuzz` bytes by chance: that which the variable BACKHAUL_FUZZ_TARGET names. They are
//! one program because it takes minutes to build.
#![no_main]

use std::alloc::System;
use std::env;
use std::sync::LazyLock;

use backhaul::fuzz::{TARGETS, Target};
use cap::Cap;
use libfuzzer_sys::fuzz_target;

/// What a parser may take of memory for what is always the same, such as tables that it makes once.
const BYTES_BASE: usize = 16 << 20;
/// And for each byte that it reads: a value of JSON that is one digit takes some tens.
const BYTES_PER_BYTE_MAX: usize = 512;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = env::var("BACKHAUL_FUZZ_TARGET").expect("BACKHAUL_FUZZ_TARGET is to name a target");
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    found.unwrap_or_else(|| panic!("there is no target {wanted}")).1
});

fuzz_target!(init: LazyLock::force(&TARGET), |data: &[u8]| within_bounds(data, *TARGET));

/// Calls the target, which must do with memory in proportion to its input: one that wants more is ended.
fn within_bounds(data: &[u8], target: Target) {
    let limit = MEMORY.allocated() + BYTES_BASE + data.len() * BYTES_PER_BYTE_MAX;
    MEMORY.set_limit(limit).expect("more than what is there");
    target(data);
    MEMORY.set_limit(usize::MAX).expect("no limit");
}
