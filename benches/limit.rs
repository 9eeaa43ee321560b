//! What all cores can do at most: digests and compression of a file that is in memory already, with the same libraries
//! as a backup, and nothing else. `make bench` sets the speed of backups beside it.
//!
//! `limit FILE none|zlib|zstd|hash` prints the seconds that it took. `hash` is what an incremental backup does with blocks
//! that have not changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

use backhaul::engine::chunked::digest::{BlockDigester, md5};
use backhaul::engine::chunked::{Compression, ZSTD_LEVEL};

/// The default size of an object and of a block.
const OBJECT_BYTES: usize = 16 << 20;
const BLOCK_BYTES: usize = 32 << 10;

fn main() {
    let mut arguments = env::args().skip(1).filter(|argument| argument != "--bench");
    let (Some(path), Some(work)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: limit FILE none|zlib|zstd|hash");
        return;
    };
    let compression: Option<Compression> = (work != "hash").then(|| work.parse().unwrap());
    let file = fs::read(path).unwrap();
    let chunks: Vec<&[u8]> = file.chunks(OBJECT_BYTES).collect();
    let (digester, next) = (BlockDigester::new(BLOCK_BYTES), AtomicUsize::new(0));
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut zero = true;
                    for block in chunk.chunks(BLOCK_BYTES) {
                        zero &= digester.digest(block).1;
                    }
                    // A chunk of zeros is packed once for all.
                    if let (false, Some(compression)) = (zero, compression) {
                        std::hint::black_box((compression.compress(chunk, ZSTD_LEVEL).unwrap(), md5(chunk)));
                    }
                }
            });
        }
    });
    println!("{:.3}", started.elapsed().as_secs_f64());
}
