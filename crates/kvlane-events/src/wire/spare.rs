//! Vectors of batches that are done with, to be filled again.
//!
//! Nearly every event has one short vector of hashes and one of tokens. Asking the allocator for them anew took a fifth of the time of
//! decoding a batch of single-block events. Large ones are not kept: their allocation does not show beside their content, and
//! a router has many publishers.

use super::{Batch, WireEvent};
use kvlane_index::EngineHash;

/// At most so many vectors of each kind are kept: the events of a batch.
const KEPT: usize = 64;
/// Of at most so many elements: with 64 of each kind, 384 KiB for one publisher.
const KEPT_ELEMENTS: usize = 512;

/// The store of one decoder.
#[derive(Clone, Debug, Default)]
pub(super) struct Spare {
    hashes: Vec<Vec<EngineHash>>,
    tokens: Vec<Vec<u32>>,
}

impl Spare {
    /// An empty vector for hashes.
    pub(super) fn hashes(&mut self) -> Vec<EngineHash> {
        self.hashes.pop().unwrap_or_default()
    }

    /// An empty vector for tokens.
    pub(super) fn tokens(&mut self) -> Vec<u32> {
        self.tokens.pop().unwrap_or_default()
    }

    /// Takes back what a batch was made of.
    pub(super) fn take(&mut self, batch: Batch<'_>) {
        for event in batch.events {
            match event {
                WireEvent::Stored(stored) => {
                    keep(&mut self.hashes, stored.hashes);
                    keep(&mut self.tokens, stored.tokens);
                }
                WireEvent::Removed(removed) => keep(&mut self.hashes, removed.hashes),
                WireEvent::Cleared => {}
            }
        }
    }
}

fn keep<T>(kept: &mut Vec<Vec<T>>, mut vector: Vec<T>) {
    if kept.len() < KEPT && vector.capacity() <= KEPT_ELEMENTS {
        vector.clear();
        kept.push(vector);
    }
}
