//! The questions that a run answers, one file each, in the order of BENCHMARKS.md.

pub mod exact;
pub mod hashing;
pub mod ingest;
pub mod memory;
pub mod mixed;
pub mod query;
pub mod removal;
pub mod replay;

use std::path::PathBuf;

use crate::contenders::{dynamo, kvlane, smg};
use crate::lane::{self, Lane};

/// How to run a question.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Interleaved rounds; figures are medians of them.
    pub rounds: usize,
    /// Small sizes, to see that everything works.
    pub quick: bool,
    /// Which contenders run, by the name of the index; empty = all.
    pub only: Vec<String>,
    /// Where the sheets go.
    pub folder: PathBuf,
    /// A recorded trace, for `replay`.
    pub trace: Option<PathBuf>,
}

impl Plan {
    /// The contenders that this run has, ours last.
    pub fn lanes(&self, single_threaded: bool) -> Vec<Box<dyn Lane>> {
        let mut lanes = vec![lane::of::<dynamo::Pooled>()];
        if single_threaded {
            lanes.push(lane::of::<dynamo::Radix>());
        }
        lanes.push(lane::of::<smg::Chain>());
        lanes.push(lane::of::<kvlane::Kvlane>());
        lanes.retain(|lane| self.only.is_empty() || self.only.iter().any(|name| name == lane.ways()[0]));
        lanes
    }

    /// The full or the quick size.
    pub fn size(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

/// Calls `each` for every round and index, beginning with another index each round.
pub fn interleave(rounds: usize, count: usize, mut each: impl FnMut(usize, usize)) {
    for round in 0..rounds {
        for turn in 0..count {
            each(round, (round + turn) % count);
        }
    }
}
