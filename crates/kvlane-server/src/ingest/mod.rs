//! Engine events from the sockets into the index.
//!
//! ```text
//! PUB, ROUTER ─▶ zmtp ─▶ socket: a task per connection ─▶ publisher: kvlane_events::stream, a task per rank
//!                                                              ▼
//!                                      lane: one for each partition, bounded ─▶ its one writer thread ─▶ rebuild ─▶ index
//! ```
//!
//! TensorRT-LLM's buffered events are fetched over HTTP instead, by one task for each instance ([`drained`]).
//!
//! Nothing between a socket and the index drops: a full queue makes its sender wait, up to the TCP connection, where the engine's own
//! queue fills and at last drops, which shows as a hole in the sequence and is repaired by a replay.

mod drained;
mod lane;
mod learner;
mod publisher;
mod socket;
mod stats;
mod tap;
mod weighed;
pub(crate) mod zmtp;

pub(crate) use drained::{Draining, drain};
pub(crate) use lane::{ImageReply, Lane, Work};
pub(crate) use learner::Learner;
pub(crate) use publisher::{Beginnings, Following, Report, follow};
pub(crate) use stats::RankCounters;
pub use stats::{AppliedTotals, RankStats};
pub use tap::{Tap, Tapped};

#[cfg(test)]
mod tests;
