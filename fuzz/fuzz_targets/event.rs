#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| backhaul_fuzz::within_bounds(data, backhaul::fuzz::event));
