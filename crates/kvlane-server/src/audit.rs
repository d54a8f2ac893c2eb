//! The prediction of each request against the engine's own count of cached tokens.
//!
//! An engine always computes the last token of a prompt, so a prompt of n tokens can hit at most the whole blocks among its first
//! n - 1. The prediction is what the index had *confirmed* for the worker when the request was decided; a deeper predicted placement is not
//! promised, only hoped for, and shows as the cause where it came true.
//!
//! A difference has a cause that may become visible only after the response: a cache reset is announced with the very
//! request that runs into it. So an inexact result is settled up to [`SETTLE_MAX`] later, by comparing what the
//! worker's event stream did since the decision ([`Evidence`]).

use crate::explain::Record;
use crate::metrics::{Metrics, WorkerMetrics};
use kvlane_index::Worker;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// After this time an inexact result gets the cause that is known by then.
const SETTLE_MAX: Duration = Duration::from_secs(1);
/// A removal or a store counts as the cause only after this time: a reset, which explains more, may still be on its way.
const SETTLE_RESET_FIRST: Duration = Duration::from_millis(150);
/// Between two looks at the unsettled.
const SETTLE_TICK: Duration = Duration::from_millis(50);
/// Inexact results that wait at a time; more are settled at once with what is known.
const UNSETTLED_MAX: usize = 4096;

/// What was expected of the worker that served a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Prediction {
    /// Prompt tokens that the index had confirmed in its device memory, in whole blocks of the first n - 1 tokens.
    pub cached_tokens: u32,
    /// The same with predicted placements: at least `cached_tokens`.
    pub placed_tokens: u32,
    /// The same with all storage tiers.
    pub tiered_tokens: u32,
    /// Length of the prompt.
    pub prompt_tokens: u32,
}

impl Prediction {
    /// From depths in blocks. An engine computes at least the last of `prompt_tokens`.
    pub(crate) fn new(prompt_tokens: u32, block_size: u32, device: u32, predicted: u32, tiered: u32) -> Self {
        let most = prompt_tokens.saturating_sub(1) / block_size.max(1);
        let tokens = |blocks: u32| blocks.min(most) * block_size;
        Self {
            cached_tokens: tokens(device),
            placed_tokens: tokens(predicted.max(device)),
            tiered_tokens: tokens(tiered.max(device)),
            prompt_tokens,
        }
    }
}

/// What a worker's event stream has done so far; differences tell what happened between two moments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Evidence {
    /// Lives of the publisher that were seen.
    pub epoch: u64,
    /// Times that everything was cleared.
    pub cleared: u64,
    /// Events that removed blocks.
    pub removed_events: u64,
    /// Whether every event since the beginning is known.
    pub complete: bool,
}

/// Why a prediction was not exact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cause {
    /// The engine found what a predicted placement had promised and no event had confirmed yet.
    PredictedPlacement,
    /// The engine found blocks in a slower tier, which are not part of the prediction.
    LowerTier,
    /// The engine removed blocks between the decision and the prefill.
    EvictedMeanwhile,
    /// The engine had stored blocks whose events came after the decision.
    EventLag,
    /// The engine had been reset, and said so only when this request ran.
    ResetNotAnnounced,
    /// Events from before this router's time, or from a gap, are not known.
    EventsMissing,
    /// The engine counts another length of prompt: it does not see the tokens that were computed here.
    TokensDiffer,
    /// The engine stored other blocks than were computed here.
    BlocksDiffer,
    /// None of the above.
    Mismatch,
}

impl Cause {
    /// The name used in JSON and metrics.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::PredictedPlacement => "predicted_placement",
            Self::LowerTier => "lower_tier",
            Self::EvictedMeanwhile => "evicted_meanwhile",
            Self::EventLag => "event_lag",
            Self::ResetNotAnnounced => "reset_not_yet_announced",
            Self::EventsMissing => "events_missing",
            Self::TokensDiffer => "tokens_differ",
            Self::BlocksDiffer => "blocks_differ",
            Self::Mismatch => "mismatch",
        }
    }
}

/// A settled comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Audit {
    /// What was predicted; `None` where the prompt's tokens were not known.
    pub predicted_tokens: Option<u32>,
    /// What came of it.
    pub verdict: Verdict,
}

/// The result of a comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// As predicted.
    Exact {
        /// The engine's count.
        actual: u32,
    },
    /// More or less than predicted.
    Inexact {
        /// The engine's count.
        actual: u32,
        /// Why.
        cause: Cause,
    },
    /// Not compared, and why not.
    Unaudited {
        /// The engine's count, if it gave one.
        actual: Option<u32>,
        /// Why.
        reason: &'static str,
    },
}

impl Audit {
    /// The engine's count.
    pub(crate) fn actual_tokens(&self) -> Option<u32> {
        match self.verdict {
            Verdict::Exact { actual } | Verdict::Inexact { actual, .. } => Some(actual),
            Verdict::Unaudited { actual, .. } => actual,
        }
    }

    /// The cause in JSON and metrics: `exact`, why it was not exact, or why it was not compared.
    pub(crate) fn cause(&self) -> &'static str {
        match self.verdict {
            Verdict::Exact { .. } => "exact",
            Verdict::Inexact { cause, .. } => cause.name(),
            Verdict::Unaudited { reason, .. } => reason,
        }
    }

    /// `exact`, `over` (more was predicted than found), `under` or `unaudited`.
    pub(crate) fn result(&self) -> &'static str {
        match self.verdict {
            Verdict::Exact { .. } => "exact",
            Verdict::Inexact { actual, .. } if self.predicted_tokens.is_some_and(|p| p > actual) => "over",
            Verdict::Inexact { .. } => "under",
            Verdict::Unaudited { .. } => "unaudited",
        }
    }
}

/// What can be asked about a worker while a result is settled.
pub(crate) trait Witness: Send + 'static {
    /// What the worker's event stream has done so far.
    fn evidence(&self, worker: Worker) -> Evidence;
    /// Tokens of the request's prompt that the index now confirms at the worker.
    fn confirmed_tokens(&self, case: &Case) -> u32;
    /// A case was settled.
    fn found(&mut self, case: &Case, cause: Cause);
}

/// A comparison that is not exact and not settled.
#[derive(Debug)]
pub(crate) struct Case {
    /// The request.
    pub record: Arc<Record>,
    /// Where the counters of its worker are.
    pub metrics: WorkerMetrics,
    /// Who served it.
    pub worker: Worker,
    /// What was expected.
    pub prediction: Prediction,
    /// The worker's evidence at the decision.
    pub before: Evidence,
    /// The blocks of the prompt and where to look for them; `None` = nowhere.
    pub blocks: Option<crate::gateway::PromptBlocks>,
    /// The engine's count.
    pub actual: u32,
    /// The engine's length of the prompt, if it said so.
    pub actual_prompt_tokens: Option<u64>,
    /// When the response ended.
    pub since: Instant,
    /// The result is settled, and only looked at again to see that the engine's events hold the prompt's blocks.
    pub proof: bool,
}

impl Case {
    fn differs_in_length(&self) -> bool {
        self.actual_prompt_tokens.is_some_and(|n| n != u64::from(self.prediction.prompt_tokens))
    }
}

/// What speaks against the tokens of a request whose result was as predicted: an engine has stored every whole block of a prompt
/// by the end of the answer, so an index that does not hold them was told of others.
fn disproof(case: &Case, waited: Duration, witness: &impl Witness) -> Option<Option<Cause>> {
    if case.differs_in_length() {
        return Some(Some(Cause::TokensDiffer));
    }
    let now = witness.evidence(case.worker);
    let undisturbed = now.complete && Evidence { complete: true, ..case.before } == now;
    let block_size = case.blocks.as_ref().map_or(1, |b| b.block_size);
    let whole = case.prediction.prompt_tokens.saturating_sub(1) / block_size * block_size;
    if !undisturbed || witness.confirmed_tokens(case) >= whole {
        return Some(None);
    }
    (waited >= SETTLE_MAX).then_some(Some(Cause::BlocksDiffer))
}

/// Why the engine's count differs, if that is known after `waited`. At [`SETTLE_MAX`] there is always an answer.
fn cause(case: &Case, waited: Duration, witness: &impl Witness) -> Option<Cause> {
    let Case { prediction, before, actual, .. } = case;
    let now = witness.evidence(case.worker);
    let over = prediction.cached_tokens > *actual;
    if over && (now.epoch != before.epoch || now.cleared != before.cleared) {
        return Some(Cause::ResetNotAnnounced);
    }
    if case.differs_in_length() {
        return Some(Cause::TokensDiffer);
    }
    if !over && prediction.placed_tokens >= *actual {
        return Some(Cause::PredictedPlacement);
    }
    if !over && prediction.tiered_tokens >= *actual {
        return Some(Cause::LowerTier);
    }
    if waited < SETTLE_RESET_FIRST {
        return None;
    }
    if over && now.removed_events != before.removed_events {
        return Some(Cause::EvictedMeanwhile);
    }
    if !over && witness.confirmed_tokens(case) >= *actual {
        return Some(Cause::EventLag);
    }
    if waited < SETTLE_MAX {
        return None;
    }
    Some(if before.complete && now.complete { Cause::Mismatch } else { Cause::EventsMissing })
}

/// Compares and counts; the slow cases wait in a task of their own.
#[derive(Debug)]
pub(crate) struct Auditor {
    unsettled: mpsc::Sender<Case>,
}

impl Auditor {
    /// An auditor and the task that settles for it, which ends when the auditor is dropped.
    pub(crate) fn new<W: Witness>(metrics: Arc<Metrics>, witness: W) -> (Self, impl Future<Output = ()>) {
        let (sender, receiver) = mpsc::channel(UNSETTLED_MAX);
        (Self { unsettled: sender }, settle(receiver, metrics, witness))
    }

    /// Takes a comparison that is not exact, or one to prove.
    pub(crate) fn settle(&self, case: Case, metrics: &Metrics) {
        if let Err(full) = self.unsettled.try_send(case) {
            let case = full.into_inner();
            if case.proof {
                return;
            }
            let reason = "too-many-unsettled";
            finish(&case, Verdict::Unaudited { actual: Some(case.actual), reason }, metrics);
        }
    }
}

async fn settle<W: Witness>(mut unsettled: mpsc::Receiver<Case>, metrics: Arc<Metrics>, mut witness: W) {
    let mut waiting: Vec<Case> = Vec::new();
    loop {
        let open = if waiting.is_empty() {
            unsettled.recv().await.map(|case| waiting.push(case)).is_some()
        } else {
            tokio::time::sleep(SETTLE_TICK).await;
            true
        };
        while waiting.len() < UNSETTLED_MAX
            && let Ok(case) = unsettled.try_recv()
        {
            waiting.push(case);
        }
        waiting.retain(|case| {
            let waited = case.since.elapsed();
            let found = if case.proof {
                let Some(found) = disproof(case, waited, &witness) else { return true };
                found
            } else {
                let Some(cause) = cause(case, waited, &witness) else { return true };
                finish(case, Verdict::Inexact { actual: case.actual, cause }, &metrics);
                Some(cause)
            };
            if let Some(cause) = found {
                witness.found(case, cause);
            }
            false
        });
        if !open && waiting.is_empty() {
            return;
        }
    }
}

fn finish(case: &Case, verdict: Verdict, metrics: &Metrics) {
    let audit = Audit { predicted_tokens: Some(case.prediction.cached_tokens), verdict };
    conclude(&case.record, audit, &case.metrics, metrics);
}

/// Counts a settled comparison and completes the record.
pub(crate) fn conclude(record: &Record, audit: Audit, worker: &WorkerMetrics, metrics: &Metrics) {
    metrics.audited(audit.result(), audit.cause());
    if let (Some(predicted), Some(actual), "exact" | "over" | "under") =
        (audit.predicted_tokens, audit.actual_tokens(), audit.result())
    {
        worker.prompt_tokens.inc_by(u64::from(record.decision.prompt_tokens));
        worker.predicted_cached_tokens.inc_by(u64::from(predicted));
        worker.cached_tokens.inc_by(u64::from(actual));
    }
    // Set once, by whoever ends the request or settles it.
    let _ = record.audit.set(audit);
}

#[cfg(test)]
mod tests;
