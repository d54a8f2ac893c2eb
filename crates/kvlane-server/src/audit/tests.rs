//! Which cause a surprise gets, from what the worker's stream did.

use super::*;
use crate::explain::Ring;
use std::sync::Mutex;
use std::time::SystemTime;

/// A stream that did what a test says.
struct Told {
    now: Evidence,
    confirmed: u32,
}

impl Witness for Told {
    fn evidence(&self, _worker: Worker) -> Evidence {
        self.now
    }

    fn confirmed_tokens(&self, _case: &Case) -> u32 {
        self.confirmed
    }

    fn found(&mut self, _case: &Case, _cause: Cause) {}
}

const CALM: Evidence = Evidence { epoch: 1, cleared: 0, removed_events: 5, complete: true };

/// A request of 200 tokens where 64 were predicted, 96 with placements and 128 with all tiers.
fn case(actual: u32) -> Case {
    let metrics = Metrics::new();
    let record = Arc::new(Record {
        id: Ring::new(1).next_id(),
        at: SystemTime::UNIX_EPOCH,
        path: "".into(),
        model: None,
        stream: false,
        tokens: crate::explain::Tokens::Local,
        routing_ms: 0.0,
        waited_ms: 0.0,
        decision: kvlane_sched::Decision::default(),
        shadows: Vec::new(),
        handover: crate::gateway::Handover::NotOffered,
        table: Arc::default(),
        course: Mutex::default(),
        audit: std::sync::OnceLock::new(),
    });
    Case {
        record,
        metrics: metrics.worker("w"),
        worker: Worker::new(0, 0),
        prediction: Prediction::new(200, 32, 2, 3, 4),
        before: CALM,
        blocks: None,
        actual,
        actual_prompt_tokens: Some(200),
        since: Instant::now(),
        proof: false,
    }
}

fn check(actual: u32, now: Evidence, confirmed: u32, waited: Duration, want: Option<Cause>) {
    let found = cause(&case(actual), waited, &Told { now, confirmed });
    assert_eq!(found, want, "{actual} after {waited:?}, {now:?}");
}

#[test]
fn an_engine_never_hits_the_last_token() {
    let at_most = |prompt_tokens| Prediction::new(prompt_tokens, 32, 9, 9, 9).cached_tokens;
    assert_eq!([0, 1, 32, 33, 64, 65].map(at_most), [0, 0, 0, 32, 32, 64]);
    let p = Prediction::new(100, 32, 1, 2, 3);
    assert_eq!((p.cached_tokens, p.placed_tokens, p.tiered_tokens), (32, 64, 96));
}

#[test]
fn a_reset_explains_first_and_may_come_late() {
    let reset = Evidence { cleared: 1, removed_events: 9, ..CALM };
    let evicted = Evidence { removed_events: 9, ..CALM };
    check(0, reset, 0, Duration::ZERO, Some(Cause::ResetNotAnnounced));
    check(0, evicted, 0, Duration::ZERO, None);
    check(0, evicted, 0, SETTLE_RESET_FIRST, Some(Cause::EvictedMeanwhile));
    check(0, Evidence { epoch: 2, ..CALM }, 0, Duration::ZERO, Some(Cause::ResetNotAnnounced));
}

#[test]
fn more_than_predicted_has_its_own_causes() {
    check(96, CALM, 0, Duration::ZERO, Some(Cause::PredictedPlacement));
    check(128, CALM, 0, Duration::ZERO, Some(Cause::LowerTier));
    check(160, CALM, 160, Duration::ZERO, None);
    check(160, CALM, 160, SETTLE_RESET_FIRST, Some(Cause::EventLag));
}

#[test]
fn what_nothing_explains_is_a_mismatch_in_the_end() {
    check(0, CALM, 0, SETTLE_RESET_FIRST, None);
    check(0, CALM, 0, SETTLE_MAX, Some(Cause::Mismatch));
    check(160, CALM, 0, SETTLE_MAX, Some(Cause::Mismatch));
    check(160, Evidence { complete: false, ..CALM }, 0, SETTLE_MAX, Some(Cause::EventsMissing));
}

#[test]
fn blocks_that_the_engine_never_stored_speak_against_the_tokens() {
    let check = |now, confirmed, waited, want| {
        assert_eq!(
            disproof(&case(64), waited, &Told { now, confirmed }),
            want,
            "{confirmed} after {waited:?}"
        );
    };
    check(CALM, 199, Duration::ZERO, Some(None));
    check(CALM, 64, Duration::ZERO, None);
    check(CALM, 64, SETTLE_MAX, Some(Some(Cause::BlocksDiffer)));
    // An eviction or a reset explains it, and an incomplete view proves nothing.
    check(Evidence { removed_events: 6, ..CALM }, 64, SETTLE_MAX, Some(None));
    check(Evidence { complete: false, ..CALM }, 64, SETTLE_MAX, Some(None));
    let longer = Case { actual_prompt_tokens: Some(201), ..case(64) };
    let told = Told { now: CALM, confirmed: 199 };
    assert_eq!(disproof(&longer, Duration::ZERO, &told), Some(Some(Cause::TokensDiffer)));
}
