//! How candidates are scored: one small trait, one file per policy.
//!
//! A policy writes one row of terms per eligible candidate; their sum is the cost and the least cost wins, ties drawn fairly. So "why this worker"
//! has the same answer under every policy: the row with the least total.

mod affine;
mod kv;
mod reference;
mod simple;

pub use affine::{ConsistentHash, StickySession};
pub use kv::Kv;
pub use reference::Reference;
pub use simple::{LeastLoaded, PowerOfTwo, Random, RoundRobin};

use crate::decision::Row;
use crate::ledger::Ledger;
use crate::rates::Rates;
use crate::{Candidate, Request};
use kvlane_index::Worker;
use std::fmt;
use std::str::FromStr;

/// What a policy sees of the eligible candidates together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fleet {
    /// How many there are; at least 1.
    pub eligible: u32,
    /// Requests in flight at all of them.
    pub requests: u64,
    /// Share of time, 0 to 1, that they spend on prefill.
    pub utilisation: f64,
    /// Requests that came for each of them lately, per millisecond.
    pub arrivals_per_ms: f64,
    /// When the decision is made.
    pub now_ms: f64,
    /// Where the request's session was last, if that worker is eligible.
    pub session_worker: Option<Worker>,
}

/// What a policy sees of one eligible candidate.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The candidate.
    pub candidate: &'a Candidate<'a>,
    /// How fast it is, as far as is known.
    pub rates: Rates,
    /// Tokens that it recently made room for, over the mean of the eligible.
    pub allocation: f64,
    /// It and the others.
    pub fleet: &'a Fleet,
    /// What is in flight.
    pub ledger: &'a Ledger,
}

/// What a policy sees of the request.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The request.
    pub request: &'a Request<'a>,
    /// Prompt length, known or estimated; at least 1.
    pub prompt_tokens: u32,
    /// Output length to expect; at least 1.
    pub output_tokens: u32,
}

/// A way to compare workers.
pub trait Policy: Send + Sync + fmt::Debug {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Whether it reads overlaps. A policy that does not runs with no index, no subscription and no tokenizer.
    fn needs_cache_knowledge(&self) -> bool;

    /// What its terms are measured in.
    fn unit(&self) -> &'static str;

    /// Names of its terms, at most [`crate::MAX_TERMS`].
    fn columns(&self) -> &'static [&'static str];

    /// How many eligible candidates, drawn at random, it compares; `None` = all.
    fn sample(&self) -> Option<usize> {
        None
    }

    /// Whether requests wait in an [`crate::queue::AdmissionQueue`] while every eligible worker is saturated, unless an operator says otherwise.
    fn holds_back(&self) -> bool {
        false
    }

    /// Writes `row.terms` from `row.load` and the view. `row.cached_tokens` is set and may be lowered.
    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row);
}

/// No policy has this name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownPolicy(pub String);

impl fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no policy is called {:?}; there are {}", self.0, NAMES.join(", "))
    }
}

impl std::error::Error for UnknownPolicy {}

/// Names of the policies, the default first.
pub const NAMES: &[&str] = &[
    "kv",
    "round-robin",
    "random",
    "least-loaded",
    "power-of-two",
    "consistent-hash",
    "sticky-session",
    "reference",
];

impl Default for Box<dyn Policy> {
    fn default() -> Self {
        Box::new(Kv)
    }
}

impl FromStr for Box<dyn Policy> {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Ok(match name {
            "kv" => Box::new(Kv),
            "round-robin" => Box::new(RoundRobin),
            "random" => Box::new(Random),
            "least-loaded" => Box::new(LeastLoaded),
            "power-of-two" => Box::new(PowerOfTwo),
            "consistent-hash" => Box::new(ConsistentHash),
            "sticky-session" => Box::new(StickySession),
            "reference" => Box::new(Reference),
            _ => return Err(UnknownPolicy(name.to_owned())),
        })
    }
}
