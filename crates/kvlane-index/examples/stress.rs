//! Readers beside a writer for as long as wanted, on as many cores as there are; every answer is checked.
//!
//! ```text
//! cargo run --release -p kvlane-index --example stress -- [--seconds N] [--seed N] [--readers N] [--writers N] [--each N] [--regime NAME]
//! ```
//!
//! Each of `--writers` partitions (by default 1) has `--readers` readers of its own (by default 2 for each core: oversubscribed). Goes round
//! all regimes of `tests/model/regime.rs`, `--each` (400) operations of one seed at a time. Prints what was checked; an answer
//! that says more than was true at any moment of its query, or other than the truth while the writer rested, ends the run with status 1.

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
use std::time::{Duration, Instant};

use model::race::{Seen, race};
use model::regime::REGIMES;

fn number(name: &str, or: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|a| a != name);
    arguments.nth(1).map_or(or, |value| value.parse().unwrap_or_else(|_| panic!("{name} takes a number")))
}

fn main() -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (readers, writers, each) =
        (number("--readers", 2 * cores), number("--writers", 1), number("--each", 400));
    let (seconds, first) = (number("--seconds", 10), number("--seed", 1));
    let only = std::env::args().skip_while(|a| a != "--regime").nth(1).unwrap_or_default();
    let regimes: Vec<_> = REGIMES.into_iter().filter(|r| r.name.contains(&only)).collect();
    assert!(!regimes.is_empty(), "no regime is called {only:?}");

    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let seen = Mutex::new(vec![Seen::default(); regimes.len()]);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                while start.elapsed() < Duration::from_secs(seconds) && !failed.load(Relaxed) {
                    let turn = next.fetch_add(1, Relaxed);
                    let which = (turn % regimes.len() as u64) as usize;
                    let (regime, seed) = (regimes[which], first + turn / regimes.len() as u64);
                    match race(regime, seed, each, readers) {
                        Ok(more) => seen.lock().expect("no thread panics with it")[which] += more,
                        Err(difference) => {
                            failed.store(true, Relaxed);
                            println!(
                                "DIFFERENCE: regime {:?}, seed {seed}, {each} operations: {difference}",
                                regime.name
                            );
                        }
                    }
                }
            });
        }
    });
    let mut all = Seen::default();
    println!("{:<26} {:>12} {:>12} {:>12} {:>12}", "regime", "operations", "answers", "raced", "under");
    for (regime, seen) in regimes.iter().zip(seen.into_inner().expect("all threads ended")) {
        let Seen { operations, answers, raced, under } = seen;
        println!("{:<26} {operations:>12} {answers:>12} {raced:>12} {under:>12}", regime.name);
        all += seen;
    }
    let Seen { operations, answers, raced, under } = all;
    let differences = u64::from(failed.load(Relaxed));
    println!(
        "{operations} operations beside {answers} answers, {raced} during one, {under} under-counts, {differences} over-counts; \
         seeds from {first}, {writers} writers with {readers} readers each, {cores} cores, {:.0} s",
        start.elapsed().as_secs_f64()
    );
    if differences == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
