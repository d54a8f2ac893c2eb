//! What other policies would have done with the traffic of now, for whoever thinks of switching (`--shadow`).
//!
//! Each looks at the same request, candidates and caches as the acting policy, right after it booked and under the same lock, and lives with its own
//! imagined load ([`kvlane_sched::shadow`]). What it chose stands in the request's explanation, and its sums beside the acting policy's in the
//! metrics. Costs are the acting policy's: one measure for all of them.

use super::desk::Books;
use crate::explain::{Onlooker, Record};
use crate::metrics::Metrics;
use kvlane_sched::{Candidate, Decision, Request};

/// Lets every shadow choose for a request that was just booked by `decision`.
pub(super) fn look(
    books: &mut Books,
    request: &Request<'_>,
    candidates: &[Candidate<'_>],
    decision: &Decision,
    now_ms: f64,
) -> Vec<Onlooker> {
    let Books { scheduler, shadows, rng, .. } = books;
    let look = |shadow: &mut kvlane_sched::shadow::Shadow| {
        let choice = shadow.choose(scheduler, request, candidates, now_ms, rng)?;
        let cost = decision.row(choice.worker).map(|row| row.total).filter(|cost| cost.is_finite());
        Some(Onlooker { policy: shadow.policy().name(), choice, cost })
    };
    shadows.iter_mut().filter_map(look).collect()
}

/// Counts what was chosen, if anybody looks on.
pub(super) fn count(record: &Record, metrics: &Metrics) {
    let Some(worker) = record.decision.worker().filter(|_| !record.shadows.is_empty()) else { return };
    let row = record.decision.row(worker);
    let cached_tokens = row.map_or(0, |row| row.cached_tokens);
    metrics.chose(record.decision.policy, true, true, cached_tokens, row.map(|row| row.total));
    for Onlooker { policy, choice, cost } in &record.shadows {
        metrics.chose(policy, false, choice.worker == worker, choice.cached_tokens, *cost);
    }
}
