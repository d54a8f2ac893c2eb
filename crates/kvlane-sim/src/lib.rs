//! Deterministic simulation of a fleet on request traces.
//!
//! One seed gives one run: the events of engines, network and clients lie in one queue ordered by simulated time, and the engines
//! and the scheduler are the crates that run in production.

pub mod bounds;
pub mod fleet;
pub mod knowledge;
pub mod outcome;
pub mod report;
pub mod trace;
