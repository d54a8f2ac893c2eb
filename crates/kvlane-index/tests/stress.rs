//! Readers beside the writer, over all regimes: an answer never exceeds what was true at some moment of the query, and is equal when
//! the writer rests.
//!
//! CI runs a bounded number, oversubscribed. `KVLANE_OPS` sets the operations for each regime (default 150), `KVLANE_SEED` the
//! seed, `KVLANE_REGIME` a part of the name of the regimes to run. Longer and wider: the example `stress`.

#![expect(clippy::disallowed_methods, reason = "a test: threads, set by the environment")]

mod model;

use model::race::{Seen, race};
use model::regime::REGIMES;

#[test]
fn no_reader_ever_sees_more_than_was_true() {
    let number = |name, or| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let (operations, seed): (u64, u64) = (number("KVLANE_OPS", 150), number("KVLANE_SEED", 1));
    let only = std::env::var("KVLANE_REGIME").unwrap_or_default();
    // More threads than cores, so that readers and writer stop in the middle of what they do.
    let readers = std::thread::available_parallelism().map_or(3, |n| n.get().min(4) as u64 + 1);
    let mut all = Seen::default();
    for regime in REGIMES.into_iter().filter(|r| r.name.contains(&only)) {
        match race(regime, seed, operations, readers) {
            Ok(seen) => all += seen,
            Err(difference) => {
                panic!("regime {:?}, seed {seed}, {operations} operations: {difference}", regime.name)
            }
        }
    }
    assert!(all.answers > 0, "{all:?}");
}
