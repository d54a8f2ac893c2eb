//! Why each request went where it went, for as long as it is likely to be asked.
//!
//! A [`Record`] is made with the decision and completed as the request runs. The last [`RECORDS_MAX`] are kept in a
//! ring whose slots are locked one by one, and the id of a request names its slot, so that keeping one costs no search
//! and no lock that another request wants.

use crate::audit::Audit;
use crate::gateway::{Handover, Table};
use kvlane_index::Worker;
use kvlane_sched::shadow::Choice;
use kvlane_sched::{Decision, FilterReason, Row};
use serde_json::{Value, json};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

/// Requests whose explanation is kept.
pub(crate) const RECORDS_MAX: usize = 4096;
/// Candidates that an explanation lists; the order of the others is not kept.
const CANDIDATES_MAX: usize = 64;

/// The name of a request, unique for the life of the process: `x-kvlane-request-id`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Id {
    /// Tells this process from its predecessor, whose ids clients may still hold.
    boot: u32,
    /// Counts requests.
    pub sequence: u64,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:x}", self.boot, self.sequence)
    }
}

impl Id {
    fn parse(text: &str) -> Option<Self> {
        let (boot, sequence) = text.split_once('-')?;
        Some(Self {
            boot: u32::from_str_radix(boot, 16).ok()?,
            sequence: u64::from_str_radix(sequence, 16).ok()?,
        })
    }
}

/// How the tokens of a prompt became known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tokens {
    /// They were in the request, or tokenized here.
    Local,
    /// The engine said them.
    Engine,
    /// Not known, and why: routed by load.
    Unknown(&'static str),
}

impl Tokens {
    /// The name used in JSON and logs.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Engine => "engine",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// An attempt that gave the client no byte.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    /// Where.
    pub worker: Worker,
    /// What went wrong; of the connection or a status, never of content.
    pub error: String,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    /// The name of the outcome.
    pub outcome: &'static str,
    /// The status that the client was sent.
    pub status: u16,
    /// Arrival to first byte; `None` = there was none.
    pub first_byte_ms: Option<f64>,
    /// Arrival to end.
    pub whole_ms: f64,
}

/// What a policy that looks on would have chosen.
#[derive(Clone, Debug)]
pub(crate) struct Onlooker {
    /// Its name.
    pub policy: &'static str,
    /// Its choice.
    pub choice: Choice,
    /// The choice's cost as the acting policy reckons it, in that one's unit; `None` where it reckoned none.
    pub cost: Option<f64>,
}

/// What was known and decided about one request.
#[derive(Debug)]
pub(crate) struct Record {
    /// Its name.
    pub id: Id,
    /// When it arrived.
    pub at: SystemTime,
    /// The path of the endpoint.
    pub path: Arc<str>,
    /// The model or adapter that was asked for.
    pub model: Option<String>,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// Where its tokens came from.
    pub tokens: Tokens,
    /// Body read to decision, in milliseconds.
    pub routing_ms: f64,
    /// Then it waited here for a worker with room, in milliseconds.
    pub waited_ms: f64,
    /// The decision, with a row for each candidate.
    pub decision: Decision,
    /// What policies that look on would have chosen.
    pub shadows: Vec<Onlooker>,
    /// Whether its prompt was computed elsewhere.
    pub handover: Handover,
    /// The fleet as it was then; knows the workers' names.
    pub table: Arc<Table>,
    /// What happened since.
    pub course: Mutex<Course>,
    /// The prediction against the engine's count; empty while the request runs.
    pub audit: OnceLock<Audit>,
}

/// What happened to a request since its decision.
#[derive(Debug, Default)]
pub(crate) struct Course {
    /// Attempts before the one that answered.
    pub attempts: Vec<Attempt>,
    /// The worker that was asked last, and the prompt tokens that were predicted to be in its cache.
    pub worker: Option<(Worker, Option<u32>)>,
    /// Set at the end.
    pub end: Option<End>,
}

impl Record {
    /// The explanation as JSON.
    pub(crate) fn json(&self) -> Value {
        let course = self.course.lock().unwrap_or_else(PoisonError::into_inner);
        let decision = &self.decision;
        let audit = self.audit.get();
        let predicted = audit
            .map(|a| a.predicted_tokens)
            .or_else(|| course.worker.map(|(_, predicted)| predicted))
            .flatten();
        let (cause, actual) = match audit {
            None => ("pending", None),
            Some(audit) => (audit.cause(), audit.actual_tokens()),
        };
        let at_ms = self.at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        json!({
            "id": self.id.to_string(),
            "at_unix_ms": at_ms,
            "path": &*self.path,
            "model": self.model,
            "stream": self.stream,
            "policy": decision.policy,
            "prompt_tokens": decision.prompt_tokens,
            "tokens_from": self.tokens.name(),
            "tokens_unknown_because": match self.tokens { Tokens::Unknown(why) => Some(why), _ => None },
            "routing_ms": self.routing_ms,
            "waited_ms": self.waited_ms,
            "worker": course.worker.map(|(worker, _)| self.table.worker_name(worker)),
            "picked_because": decision.picked_because.to_string(),
            "unit": decision.unit,
            "candidates": candidates(decision, &self.table),
            "prefill": self.handover.json(),
            "shadows": self.shadows.iter()
                .map(|s| json!({
                    "policy": s.policy,
                    "worker": self.table.worker_name(s.choice.worker),
                    "same": decision.worker() == Some(s.choice.worker),
                    "cached_tokens": s.choice.cached_tokens,
                    "cost_to_acting": s.cost,
                }))
                .collect::<Vec<_>>(),
            "failed_attempts": course.attempts.iter()
                .map(|a| json!({ "worker": self.table.worker_name(a.worker), "error": a.error }))
                .collect::<Vec<_>>(),
            "predicted_cached_tokens": predicted,
            "actual_cached_tokens": actual,
            "cause": cause,
            "outcome": course.end.as_ref().map(|e| e.outcome),
            "status": course.end.as_ref().map(|e| e.status),
            "first_byte_ms": course.end.as_ref().and_then(|e| e.first_byte_ms),
            "whole_ms": course.end.as_ref().map(|e| e.whole_ms),
        })
    }
}

/// The rows of a decision as JSON, cheapest first.
pub(crate) fn candidates(decision: &Decision, table: &Table) -> Vec<Value> {
    let mut rows: Vec<&Row> = decision.rows.iter().collect();
    rows.sort_by(|a, b| a.total.total_cmp(&b.total));
    rows.iter()
        .take(CANDIDATES_MAX)
        .map(|row| {
            let terms: serde_json::Map<String, Value> = decision
                .columns
                .iter()
                .zip(row.terms)
                .map(|(column, term)| ((*column).to_owned(), json!(term)))
                .collect();
            json!({
                "worker": table.worker_name(row.worker),
                "cached_tokens": row.cached_tokens,
                "terms": terms,
                "total": row.total.is_finite().then_some(row.total),
                "filtered": row.filtered.map(FilterReason::name),
                "load": {
                    "prefill_requests": row.load.prefill_requests,
                    "prefill_tokens": row.load.prefill_tokens,
                    "decode_requests": row.load.decode_requests,
                    "decode_tokens": row.load.decode_tokens,
                },
            })
        })
        .collect()
}

/// The explanations of the latest requests.
#[derive(Debug)]
pub(crate) struct Ring {
    boot: u32,
    next: AtomicU64,
    slots: Box<[Mutex<Option<Arc<Record>>>]>,
}

impl Ring {
    /// An empty ring; `boot` tells this process's ids from others'.
    pub(crate) fn new(boot: u32) -> Self {
        Self { boot, next: AtomicU64::new(1), slots: (0..RECORDS_MAX).map(|_| Mutex::new(None)).collect() }
    }

    /// A name for the next request.
    pub(crate) fn next_id(&self) -> Id {
        Id { boot: self.boot, sequence: self.next.fetch_add(1, Ordering::Relaxed) }
    }

    fn slot(&self, id: Id) -> &Mutex<Option<Arc<Record>>> {
        &self.slots[(id.sequence % RECORDS_MAX as u64) as usize]
    }

    /// Keeps `record` in place of the one that is [`RECORDS_MAX`] requests older.
    pub(crate) fn keep(&self, record: Arc<Record>) {
        let old = self.slot(record.id).lock().unwrap_or_else(PoisonError::into_inner).replace(record);
        drop(old);
    }

    /// The record of this id, if it is still there.
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Record>> {
        let id = Id::parse(id)?;
        let slot = self.slot(id).lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().filter(|record| record.id == id).map(Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: Id) -> Arc<Record> {
        Arc::new(Record {
            id,
            at: SystemTime::UNIX_EPOCH,
            path: "/v1/completions".into(),
            model: None,
            stream: false,
            tokens: Tokens::Unknown("blind-policy"),
            routing_ms: 0.0,
            waited_ms: 0.0,
            decision: Decision::default(),
            shadows: Vec::new(),
            handover: Handover::NotOffered,
            table: Arc::default(),
            course: Mutex::default(),
            audit: OnceLock::new(),
        })
    }

    #[test]
    fn the_latest_are_found_and_older_ones_are_not_taken_for_them() {
        let ring = Ring::new(7);
        let first = ring.next_id();
        ring.keep(record(first));
        assert_eq!(ring.find(&first.to_string()).unwrap().id, first);
        assert_eq!(ring.find(&first.to_string()).unwrap().json()["cause"], "pending");
        for _ in 0..RECORDS_MAX {
            ring.keep(record(ring.next_id()));
        }
        assert!(ring.find(&first.to_string()).is_none());
        for wrong in ["", "-", "x-1", "00000008-2", "00000007-", "00000007-ffffffffffffffffff"] {
            assert!(ring.find(wrong).is_none(), "{wrong}");
        }
    }
}
