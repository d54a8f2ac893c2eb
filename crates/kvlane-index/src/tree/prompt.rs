//! The prefix hashes of a prompt, made when a walk needs them, or ready.

use crate::BlockHash;
use crate::prefix::PrefixHasher;

pub(super) trait Prompt {
    /// Blocks followed before the first look whether the prompt still goes along a run; twice as many before each further one, so
    /// that a prompt that leaves a long run early is not hashed to its end.
    const FIRST_LOOK: usize;
    /// Blocks of the prompt.
    fn len(&self) -> usize;
    /// Prefix hash of the first block, alone.
    fn first(&self) -> Option<u64>;
    /// Prefix hash of the first `blocks` blocks, at least 1.
    fn prefix(&mut self, blocks: usize) -> u64;
}

/// Hashes a prompt as far as it is followed: sums of stretches, and each prefix only of the stretch in which it leaves a run.
pub(super) struct Lazy<'a> {
    hasher: &'a PrefixHasher,
    blocks: &'a [BlockHash],
    /// The last two numbers of blocks asked for, with their prefix hashes.
    before: (usize, u64),
    known: (usize, u64),
    /// Every prefix hash after `before` up to `known`, if they were asked for.
    pub(super) between: Vec<u64>,
}

impl<'a> Lazy<'a> {
    #[inline]
    pub(super) fn new(hasher: &'a PrefixHasher, blocks: &'a [BlockHash]) -> Self {
        let root = (0, hasher.root());
        Self { hasher, blocks, before: root, known: root, between: Vec::new() }
    }
}

impl Prompt for Lazy<'_> {
    const FIRST_LOOK: usize = 256;

    #[inline]
    fn first(&self) -> Option<u64> {
        self.blocks.first().map(|block| self.hasher.next(self.hasher.root(), *block, 0))
    }

    #[inline]
    fn len(&self) -> usize {
        self.blocks.len()
    }

    #[inline]
    fn prefix(&mut self, blocks: usize) -> u64 {
        if blocks < self.before.0 {
            self.known = (0, self.hasher.root());
        }
        if blocks >= self.known.0 {
            let (from, before) = self.known;
            self.before = self.known;
            self.known = (blocks, self.hasher.after(before, &self.blocks[from..blocks], from as u32));
            self.between.clear();
            return self.known.1;
        }
        let (from, before) = self.before;
        if blocks == from {
            return before;
        }
        if self.between.is_empty() {
            let stretch = &self.blocks[from..self.known.0];
            self.hasher.append(before, stretch, from as u32, &mut self.between);
        }
        self.between[blocks - from - 1]
    }
}

/// A prompt whose prefix hashes were made before.
pub(super) struct Ready<'a>(pub(super) &'a [u64]);

impl Prompt for Ready<'_> {
    /// There is nothing to save: one look at the last block.
    const FIRST_LOOK: usize = usize::MAX;

    #[inline]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn first(&self) -> Option<u64> {
        self.0.first().copied()
    }

    #[inline]
    fn prefix(&mut self, blocks: usize) -> u64 {
        self.0[blocks - 1]
    }
}
