//! The prompts that this router sent to a rank lately, found by their blocks.
//!
//! An orphan continues a prompt that is running now, so the latest prompts are enough. Bounded by blocks, the oldest go first.

use super::lineage::Spread;
use kvlane_index::BlockHash;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Blocks of prompts remembered.
const BLOCKS_MAX: usize = 65_536;

/// Places at which one block is looked for; a block that more prompts have (or have more often) is found at its latest.
const PLACES_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Requests {
    prompts: VecDeque<Arc<[BlockHash]>>,
    /// Number of the oldest of `prompts`.
    first: u64,
    blocks: usize,
    /// Block → (number of the prompt, position in it), the latest last.
    places: HashMap<BlockHash, VecDeque<(u64, u32)>, Spread>,
}

impl Requests {
    /// Notes a prompt; one of more than [`BLOCKS_MAX`] blocks is not remembered.
    pub(super) fn push(&mut self, prompt: &Arc<[BlockHash]>) {
        if prompt.len() > BLOCKS_MAX {
            return;
        }
        let number = self.first + self.prompts.len() as u64;
        for (at, block) in (0..).zip(prompt.iter()) {
            let places = self.places.entry(*block).or_default();
            if places.len() == PLACES_MAX {
                places.pop_front();
            }
            places.push_back((number, at));
        }
        self.blocks += prompt.len();
        self.prompts.push_back(Arc::clone(prompt));
        while self.blocks > BLOCKS_MAX {
            self.pop();
        }
    }

    fn pop(&mut self) {
        let Some(prompt) = self.prompts.pop_front() else { return };
        self.blocks -= prompt.len();
        for block in prompt.iter() {
            if let Some(places) = self.places.get_mut(block) {
                while places.front().is_some_and(|(number, _)| *number <= self.first) {
                    places.pop_front();
                }
                if places.is_empty() {
                    self.places.remove(block);
                }
            }
        }
        self.first += 1;
    }

    /// The blocks above `chain`, if there is a prompt that ends in it (or in a beginning of it), and all such prompts agree on them.
    ///
    /// To the prompt's end, because the same text may stand in the middle of many prompts, but a prompt's end is nearly always its own.
    pub(super) fn above(&self, chain: &[BlockHash]) -> Option<&[BlockHash]> {
        let mut found: Option<&[BlockHash]> = None;
        for &(number, at) in self.places.get(chain.first()?)? {
            let prompt = &self.prompts[usize::try_from(number - self.first).ok()?];
            let (above, rest) = prompt.split_at(at as usize);
            if above.is_empty() || !chain.starts_with(rest) {
                continue;
            }
            if found.is_some_and(|other| other != above) {
                // The same end at two places: no telling which.
                return None;
            }
            found = Some(above);
        }
        found
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> (usize, usize) {
        (self.blocks, self.places.values().map(VecDeque::len).sum())
    }
}
