//! The answer to "who holds the beginning of this prompt?"
//!
//! Filled by the index, read by the scheduler. The caller owns and reuses it, so a query allocates nothing
//! once warm.

use crate::Worker;

/// What one worker holds of a prompt, in blocks of the index's block size.
///
/// `device` and `predicted` are depths from the root. `host`, `disk` and `external` are *additional* blocks, counted
/// in one pass from the confirmed device depth: host first, then disk from there, then external; no block is counted
/// twice, and a prediction never anchors a lower tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overlap {
    /// Who.
    pub worker: Worker,
    /// Leading blocks confirmed in the device tier (for hybrid models: the longest usable hit).
    pub device: u32,
    /// Leading blocks in the device tier or predicted to be there; at least `device`.
    pub predicted: u32,
    /// Blocks in host memory that continue the device run.
    pub host: u32,
    /// Blocks on disk that continue from there.
    pub disk: u32,
    /// Blocks in external storage that continue from there.
    pub external: u32,
    /// The run from the root when the tiers may alternate block by block; at least the sum of the single pass.
    pub mixed: u32,
}

/// The overlaps of one prompt, sorted by worker.
///
/// A worker that holds nothing of the prompt is absent, not zero. Never more than the engines' events support
/// (see the *Consistency* section of the index).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Overlaps {
    /// One entry for each worker with any figure above 0.
    pub ranks: Vec<Overlap>,
}

impl Overlaps {
    /// The entry of `worker`, if it holds anything of the prompt.
    pub fn get(&self, worker: Worker) -> Option<&Overlap> {
        self.ranks.binary_search_by_key(&worker, |o| o.worker).ok().map(|i| &self.ranks[i])
    }
}
