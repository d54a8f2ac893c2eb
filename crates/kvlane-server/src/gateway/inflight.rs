//! What one request holds while it runs, released once whatever ends it.
//!
//! From the booking on, everything that must not leak hangs on an [`InFlight`]: the load in the ledger, the gauge, the
//! record's end, the log line, the audit. Its `Drop` is the only place that ends a request, so an answer, an error, a client that
//! leaves, a drain and a panic all take the same way.

use super::desk::Report;
use super::traffic::Passed;
use super::usage::Usage;
use super::{Gateway, PromptBlocks, Upstream};
use crate::audit::{self, Audit, Case, Evidence, Prediction, Verdict};
use crate::explain::{Attempt, End, Record, Tokens};
use crate::metrics::Outcome;
use kvlane_index::Worker;
use kvlane_sched::RequestId;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Output is reported to the ledger once per so many pieces of a stream.
const OUTPUT_BATCH: u32 = 64;

/// Blocks that an engine said it held, though no event of this life did, are predicted for this long: no event will tell when they go.
const PREDICTED_FROM_ANSWER: Duration = Duration::from_secs(60);

/// So many requests after the start have their tokens proven by the engine's events, then one in [`PROOF_EVERY`].
const PROOF_FIRST: u64 = 16;
/// See [`PROOF_FIRST`].
const PROOF_EVERY: u64 = 64;

/// A request that was booked and has not ended.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(super) gateway: Arc<Gateway>,
    pub(super) record: Arc<Record>,
    /// When the request's head was read.
    pub(super) arrived: Instant,
    upstream: Arc<Upstream>,
    worker: Worker,
    expected: Expected,
    first_byte: Option<Instant>,
    /// Pieces of the stream; each whole [`OUTPUT_BATCH`] was reported.
    pieces: u64,
    status: u16,
    outcome: Outcome,
    usage: Usage,
}

/// What is expected of the worker that a request is booked at, and how to look into a surprise.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// `None` where the tokens are not known.
    pub prediction: Option<Prediction>,
    /// Why the response cannot be compared with the prediction, if so.
    pub unaudited: Option<&'static str>,
    /// Whether it is the prefill of another request, which is the one that counts.
    pub is_prefill: bool,
    /// Stands for the adapter that the request needs.
    pub adapter: Option<u64>,
    /// The worker's event stream at the decision.
    pub evidence: Evidence,
    /// The prompt's blocks in the worker's partition.
    pub blocks: Option<PromptBlocks>,
}

impl InFlight {
    /// Guards a request that was just booked at `worker`.
    pub(super) fn new(
        gateway: Arc<Gateway>,
        record: Arc<Record>,
        arrived: Instant,
        upstream: Arc<Upstream>,
        worker: Worker,
        expected: Expected,
    ) -> Self {
        gateway.metrics.in_flight.inc();
        let it = Self {
            gateway,
            record,
            arrived,
            upstream,
            worker,
            expected,
            first_byte: None,
            pieces: 0,
            status: 499,
            outcome: Outcome::ClientGone,
            usage: Usage::default(),
        };
        it.note_worker();
        it
    }

    /// The request is now booked at another worker.
    pub(super) fn moved(&mut self, upstream: Arc<Upstream>, worker: Worker, expected: Expected) {
        self.leaves_worker();
        self.upstream = upstream;
        self.worker = worker;
        self.expected = expected;
        self.note_worker();
    }

    fn leaves_worker(&self) {
        if let Some(adapter) = self.expected.adapter {
            self.upstream.adapters.ended(self.worker.rank, adapter);
        }
    }

    fn note_worker(&self) {
        if let Some(adapter) = self.expected.adapter {
            self.upstream.adapters.began(self.worker.rank, adapter);
        }
        let predicted = self.expected.prediction.map(|p| p.cached_tokens);
        let mut course = self.record.course.lock().unwrap_or_else(PoisonError::into_inner);
        course.worker = Some((self.worker, predicted));
    }

    /// The engine that the request is booked at.
    pub(super) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The worker that the request is booked at.
    pub(super) fn worker(&self) -> Worker {
        self.worker
    }

    /// An attempt gave no byte.
    pub(super) fn attempt_failed(&self, error: String) {
        self.upstream.metrics.failed_attempts.inc();
        let mut course = self.record.course.lock().unwrap_or_else(PoisonError::into_inner);
        course.attempts.push(Attempt { worker: self.worker, error });
    }

    /// How the request will have ended, unless the client leaves before.
    pub(super) fn set_status(&mut self, status: hyper::StatusCode) {
        self.status = status.as_u16();
    }

    /// The first byte of the answer's body is here.
    pub(super) fn first_byte(&mut self) {
        let now = Instant::now();
        self.first_byte = Some(now);
        self.upstream.metrics.first_byte.observe(now - self.arrived);
        // An answer that comes whole says nothing of when its first token was there, unless there is no other token.
        if self.record.stream || self.expected.is_prefill {
            let id = self.request_id();
            self.gateway.desk.tell(id, Report::FirstToken);
            self.gateway.admission.room_may_be();
        }
    }

    /// Another piece of a stream is here: about a token.
    pub(super) fn piece(&mut self) {
        self.pieces += 1;
        if self.unreported() == 0 {
            let id = self.request_id();
            self.gateway.desk.tell(id, Report::Output(OUTPUT_BATCH));
        }
    }

    /// Pieces of the stream since the last report.
    fn unreported(&self) -> u32 {
        (self.pieces % u64::from(OUTPUT_BATCH)) as u32
    }

    /// The whole answer was passed on.
    pub(super) fn complete(&mut self, usage: Usage) {
        self.usage = usage;
        self.outcome = match self.status {
            400..=499 => Outcome::ClientError,
            500.. => Outcome::ServerError,
            _ => Outcome::Ok,
        };
    }

    /// No answer came from any worker, or it broke off.
    pub(super) fn failed(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    fn request_id(&self) -> RequestId {
        RequestId(self.record.id.sequence)
    }

    fn audit(&self) {
        let Expected { prediction, unaudited, evidence, blocks, is_prefill: _, adapter: _ } = &self.expected;
        let actual = self.usage.cached_tokens.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let reason = match (self.outcome, unaudited, prediction, actual) {
            (Outcome::ClientGone, ..) => Some("client-gone"),
            (Outcome::Ok, Some(reason), ..) => Some(*reason),
            (Outcome::Ok, _, None, _) => Some(match self.record.tokens {
                Tokens::Unknown(why) => why,
                Tokens::Local | Tokens::Engine => "no-index",
            }),
            (Outcome::Ok, _, _, None) => Some("not-reported"),
            (Outcome::Ok, ..) => None,
            _ => Some("failed"),
        };
        let predicted_tokens = prediction.map(|p| p.cached_tokens);
        let conclude = |verdict| {
            let audit = Audit { predicted_tokens, verdict };
            audit::conclude(&self.record, audit, &self.upstream.metrics, &self.gateway.metrics);
        };
        let case = |prediction, actual, proof| Case {
            record: Arc::clone(&self.record),
            metrics: self.upstream.metrics.clone(),
            worker: self.worker,
            prediction,
            before: *evidence,
            blocks: blocks.clone(),
            actual,
            actual_prompt_tokens: self.usage.prompt_tokens,
            since: Instant::now(),
            proof,
        };
        if let (None, Some(prediction), Some(actual)) = (reason, prediction, actual) {
            self.learn(prediction, actual);
        }
        match (reason, *prediction, actual) {
            (None, Some(prediction), Some(actual)) if prediction.cached_tokens == actual => {
                conclude(Verdict::Exact { actual });
                if self.record.tokens == Tokens::Local && self.is_proof() {
                    self.gateway.auditor.settle(case(prediction, actual, true), &self.gateway.metrics);
                }
            }
            (None, Some(prediction), Some(actual)) => {
                self.gateway.auditor.settle(case(prediction, actual, false), &self.gateway.metrics);
            }
            (reason, ..) => {
                conclude(Verdict::Unaudited { actual, reason: reason.unwrap_or("not-reported") });
            }
        }
    }

    /// What the engine held of the prompt without the index knowing it, counts as predicted for a while.
    fn learn(&self, prediction: &Prediction, actual: u32) {
        let Some(blocks) = &self.expected.blocks else { return };
        let same_prompt = self.usage.prompt_tokens.is_none_or(|n| n == u64::from(prediction.prompt_tokens));
        let (cached, claimed) = (actual / blocks.block_size, prediction.cached_tokens / blocks.block_size);
        let known = blocks.hashes.get(..cached as usize).filter(|_| same_prompt);
        let (Some(known), Some(counters)) =
            (known, self.upstream.rank(self.worker.rank).and_then(|r| r.counters.as_ref()))
        else {
            return;
        };
        if let Some(regained) = blocks.learner.answered(self.worker, cached, claimed) {
            let until_ms = crate::clock::now_ms() + PREDICTED_FROM_ANSWER.as_millis() as u64;
            blocks.index.predict(self.worker, known, until_ms);
            counters.update(|stats| stats.regained += regained);
        }
    }

    /// Tells whoever records of a request that an engine began to answer.
    fn tell_recorders(&self, first_byte_ms: Option<f64>) {
        let failed = matches!(self.outcome, Outcome::ClientError | Outcome::ServerError);
        if first_byte_ms.is_none() || failed || self.expected.is_prefill {
            return;
        }
        self.gateway.traffic.tell(|| Passed {
            arrived: self.arrived,
            model: self.record.model.clone(),
            input_tokens: self
                .usage
                .prompt_tokens
                .unwrap_or_else(|| self.record.decision.prompt_tokens.into()),
            output_tokens: self.usage.completion_tokens.unwrap_or(self.pieces),
            blocks: self.expected.blocks.clone(),
            cached_tokens: self.usage.cached_tokens,
            first_byte_ms,
            outcome: self.outcome.name(),
        });
    }

    /// Whether this is one of the requests whose tokens are proven by the engine's events.
    fn is_proof(&self) -> bool {
        let sequence = self.record.id.sequence;
        sequence <= PROOF_FIRST || sequence.is_multiple_of(PROOF_EVERY)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let id = self.request_id();
        // An engine that counts what it generated has told more than pieces can.
        let untold = if self.usage.completion_tokens.is_some() { 0 } else { self.unreported() };
        self.gateway.desk.tell(id, Report::End(untold));
        self.leaves_worker();
        self.gateway.admission.room_may_be();
        self.gateway.metrics.in_flight.dec();
        let whole = self.arrived.elapsed();
        self.upstream.metrics.outcome(self.outcome);
        self.upstream.metrics.whole.observe(whole);
        let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
        let first_byte_ms = self.first_byte.map(|at| ms(at - self.arrived));
        let end =
            End { outcome: self.outcome.name(), status: self.status, first_byte_ms, whole_ms: ms(whole) };
        self.record.course.lock().unwrap_or_else(PoisonError::into_inner).end = Some(end);
        self.audit();
        self.tell_recorders(first_byte_ms);
        tracing::info!(
            id = %self.record.id,
            path = &*self.record.path,
            model = self.record.model,
            worker = self.record.table.worker_name(self.worker),
            status = self.status,
            outcome = self.outcome.name(),
            prompt_tokens = self.record.decision.prompt_tokens,
            predicted_cached_tokens = self.expected.prediction.map(|p| p.cached_tokens),
            cached_tokens = self.usage.cached_tokens,
            first_byte_ms,
            whole_ms = ms(whole),
            "request"
        );
    }
}
