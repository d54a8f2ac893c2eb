//! Bytes as choices of the operation generator: index and oracle must agree after each operation.
//!
//! The first byte picks the regime; of a small regime more operations are run. What is written to stderr when it fails can be given to
//! `kvlane index run FILE --check`.

#![no_main]

#[path = "../../crates/kvlane-index/tests/model/mod.rs"]
mod model;

use libfuzzer_sys::fuzz_target;
use model::choice::Choice;
use model::regime::REGIMES;
use model::soak::run;

fuzz_target!(|data: &[u8]| {
    let Some((&first, bytes)) = data.split_first() else { return };
    let regime = REGIMES[usize::from(first) % REGIMES.len()];
    if let Err(failure) = run(regime, Choice::Bytes(bytes), u64::from(first), 400 / regime.slow) {
        panic!("{failure}");
    }
});
