//! Names of the things that hold blocks.
//!
//! The schedulable unit is a worker: one data-parallel rank of one engine process. Two ranks of a process
//! have separate caches, so nothing in this crate is ever keyed by the process alone.

use std::fmt;

/// An engine process with an address, numbered by whoever discovered it.
///
/// Opaque here. The server gives each base URL one number for the life of the process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InstanceId(pub u64);

/// One data-parallel rank of one instance: what a request is routed to.
///
/// Rank 0 is a real rank, never "unset".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Worker {
    /// The engine process.
    pub instance: InstanceId,
    /// The data-parallel rank inside it, from 0.
    pub rank: u32,
}

impl Worker {
    /// The worker `rank` of `instance`.
    pub const fn new(instance: u64, rank: u32) -> Self {
        Self { instance: InstanceId(instance), rank }
    }
}

impl fmt::Display for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.instance.0, self.rank)
    }
}
