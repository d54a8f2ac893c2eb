//! What was decided and why: one row per candidate, one column per term of its cost.
//!
//! A [`Decision`] is filled in place, so that a caller who reuses one allocates nothing once warm.

use crate::{Load, RequestId};
use kvlane_index::Worker;
use std::fmt;

/// Terms that a policy may have.
pub const MAX_TERMS: usize = 8;

/// Workers named in [`Decision::order`]: the choice and those to try if it cannot be reached. A request that fails at so many is not helped
/// by another.
pub const MAX_ORDER: usize = 8;

/// Why a candidate was not considered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FilterReason {
    /// It is draining.
    Draining,
    /// The request is pinned to another.
    NotPinned,
    /// The request may not go there.
    NotAllowed,
    /// It lacks a label that the request requires.
    MissingLabel,
    /// The policy compares a random few, and it was not among them.
    NotSampled,
}

impl FilterReason {
    /// The name used in JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::NotPinned => "not_pinned",
            Self::NotAllowed => "not_allowed",
            Self::MissingLabel => "missing_label",
            Self::NotSampled => "not_sampled",
        }
    }
}

/// Why the best row was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PickedBecause {
    /// Only one candidate was eligible.
    #[default]
    OnlyOne,
    /// Its total was the least.
    LeastCost,
    /// It was drawn from so many with the least total.
    Tie {
        /// How many were equal.
        among: u32,
    },
}

impl fmt::Display for PickedBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyOne => f.write_str("the only eligible worker"),
            Self::LeastCost => f.write_str("least cost"),
            Self::Tie { among } => write!(f, "drawn from {among} of equal least cost"),
        }
    }
}

/// One candidate in the explanation.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Who.
    pub worker: Worker,
    /// Its load when the decision was made.
    pub load: Load,
    /// Prompt tokens that it is expected not to compute; what [`crate::Scheduler::book`] reserves less.
    pub cached_tokens: u32,
    /// One value per column of [`Decision::columns`]; the others are 0.
    pub terms: [f64; MAX_TERMS],
    /// The sum of the terms; infinite for a filtered row.
    pub total: f64,
    /// Why it was not considered; `None` = eligible.
    pub filtered: Option<FilterReason>,
}

/// The choice of a worker for one request, with its explanation.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// For which request.
    pub request: Option<RequestId>,
    /// When, on the caller's clock.
    pub now_ms: f64,
    /// The policy that decided.
    pub policy: &'static str,
    /// Prompt tokens that were reckoned with.
    pub prompt_tokens: u32,
    /// Output tokens that were reckoned with.
    pub output_tokens: u32,
    /// Best first: the choice, then those to try if it cannot be reached. At most [`MAX_ORDER`]; empty after a [`Reject`].
    pub order: Vec<Worker>,
    /// What a term is measured in.
    pub unit: &'static str,
    /// Names of the terms.
    pub columns: &'static [&'static str],
    /// One row per candidate, in the order in which they were offered.
    pub rows: Vec<Row>,
    /// Why the first of `order` was taken.
    pub picked_because: PickedBecause,
    /// Tokens that the caches of all eligible candidates hold.
    pub(crate) fleet_kv_tokens: u64,
    /// Scratch of the pick, kept for its memory.
    pub(crate) ranking: Vec<u32>,
    /// Likewise: the rows of `order`.
    pub(crate) best: Vec<u32>,
}

impl Decision {
    /// The choice; `None` after a [`Reject`].
    pub fn worker(&self) -> Option<Worker> {
        self.order.first().copied()
    }

    /// The row of `worker`, if it was a candidate.
    pub fn row(&self, worker: Worker) -> Option<&Row> {
        self.rows.iter().find(|r| r.worker == worker)
    }
}

/// Why there is no decision. The rows of the [`Decision`] say which candidate fell to which filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reject {
    /// No candidate was offered: no healthy worker serves the model. Answer 503 and try later.
    NoWorkers,
    /// The request is pinned to a worker that is not among the candidates. Answer 4xx: retrying does not help.
    PinnedAbsent,
    /// Every candidate was filtered, the pin's included. Answer 503.
    NoneEligible,
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoWorkers => "no healthy worker serves this model",
            Self::PinnedAbsent => "the worker that the request is pinned to does not serve this model",
            Self::NoneEligible => "no worker is eligible for this request",
        })
    }
}

impl std::error::Error for Reject {}
