//! Holds the index against the oracle on as many generated operations as wanted, on all cores.
//!
//! ```text
//! cargo run --release -p kvlane-index --example soak -- [--millions N] [--seed N] [--threads N] [--each N] [--regime NAME]
//! ```
//!
//! Goes round all regimes of `tests/model/regime.rs` until N million operations are done (by default 1), `--each` (2,000) of one
//! seed at a time. Prints how many there were of each regime; a difference ends the run with status 1 after it was made small. Replay
//! one seed: `KVLANE_REGIME=NAME KVLANE_SEED=N KVLANE_SEEDS=1 KVLANE_OPS=2000 cargo test -p kvlane-index --test differential`.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::panic,
    reason = "a program that takes arguments, runs threads and prints what it found"
)]

#[path = "../tests/model/mod.rs"]
mod model;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use model::regime::REGIMES;
use model::soak::{Counts, seeded};

fn number(name: &str, or: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|a| a != name);
    arguments.nth(1).map_or(or, |value| value.parse().unwrap_or_else(|_| panic!("{name} takes a number")))
}

fn main() -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (millions, first) = (number("--millions", 1), number("--seed", 1));
    let wanted = (millions * 1_000_000).max(1);
    let (threads, each) = (number("--threads", cores), number("--each", 2_000));
    let only = std::env::args().skip_while(|a| a != "--regime").nth(1).unwrap_or_default();
    let regimes: Vec<_> = REGIMES.into_iter().filter(|r| r.name.contains(&only)).collect();
    assert!(!regimes.is_empty(), "no regime is called {only:?}");

    let (next, done, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let counts = Mutex::new(vec![(0u64, Counts::default()); regimes.len()]);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while done.load(Relaxed) < wanted && !failed.load(Relaxed) {
                    let turn = next.fetch_add(1, Relaxed);
                    let which = (turn % regimes.len() as u64) as usize;
                    let (regime, seed) = (regimes[which], first + turn / regimes.len() as u64);
                    match seeded(regime, seed, each) {
                        Ok(more) => {
                            let mut counts = counts.lock().expect("no thread panics with it");
                            counts[which].0 += 1;
                            counts[which].1 += more;
                            done.fetch_add(more.operations, Relaxed);
                        }
                        Err(failure) => {
                            if !failed.swap(true, Relaxed) {
                                println!(
                                    "DIFFERENCE: regime {:?}, seed {seed}: {}",
                                    regime.name,
                                    failure.shrink()
                                );
                            }
                        }
                    }
                }
            });
        }
    });
    let mut all = Counts::default();
    println!(
        "{:<26} {:>8} {:>12} {:>12} {:>12} {:>10} {:>8}",
        "regime", "seeds", "operations", "queries", "answered", "shed", "refused"
    );
    for (regime, (seeds, counts)) in regimes.iter().zip(counts.into_inner().expect("all threads ended")) {
        let Counts { operations, queries, answered, shed, refused } = counts;
        println!(
            "{:<26} {seeds:>8} {operations:>12} {queries:>12} {answered:>12} {shed:>10} {refused:>8}",
            regime.name
        );
        all += counts;
    }
    let differences = u64::from(failed.load(Relaxed));
    println!(
        "{} operations, {} queries compared ({} with an answer), {differences} differences; seeds from {first}, {threads} threads, {:.0} s",
        all.operations,
        all.queries,
        all.answered,
        start.elapsed().as_secs_f64()
    );
    if differences == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
