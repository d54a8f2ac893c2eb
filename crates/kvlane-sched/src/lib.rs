//! Load ledger and the choice of a worker: filter, score, pick.
//!
//! The scheduler is a function (request, candidates, load, now) → value. It sends nothing, reads no clock and draws randomness
//! only from the generator that it is given, so the gateway, the simulator and the benches run the same code.
//!
//! * [`Scheduler::decide`] looks and returns a [`Decision`], which says why;
//! * [`Scheduler::book`] reserves the work at the worker that was really taken, [`Scheduler::first_token`], [`Scheduler::output`] and
//!   [`Scheduler::end`] report its course. The caller calls `end` exactly once per booking, from a guard;
//! * a [`Policy`] turns candidates into rows of costs; everything else (eligibility, ties, order of failover) is common to all.
//!
//! Costs are expected milliseconds, from rates that are learnt per worker (see [`rates`]).

mod candidate;
mod decision;
mod hash;
mod learn;
mod ledger;
pub mod policy;
mod pressure;
pub mod queue;
pub mod rates;
mod request;
mod rng;
mod scheduler;
mod session;
pub mod shadow;

pub use candidate::{Adapter, Candidate, EngineLimits, OverlapTokens, Profile};
pub use decision::{Decision, FilterReason, MAX_ORDER, MAX_TERMS, PickedBecause, Reject, Row};
pub use ledger::{BookError, Ledger, Load};
pub use policy::{Policy, UnknownPolicy};
pub use pressure::Busy;
pub use request::{DEFAULT_OUTPUT_TOKENS, Pin, Request, RequestId, Wishes};
pub use rng::Rng;
pub use scheduler::{SATURATED_MS, Scheduler};

#[cfg(test)]
mod tests;
