//! The blocks of one rank's cache: which are referenced, which are free, and which free ones can still be hit.
//!
//! Follows vLLM 0.32's block pool, because routing quality hangs on *what* an engine forgets and in which order
//! (`vllm/v1/core/block_pool.py`):
//!
//! * eviction is lazy: a released block stays cached until the pool hands it out again;
//! * the free list is least-recently-used first. A request's blocks are released from the tail of its chain to the root,
//!   so of one chain the tail is evicted first; blocks without a hash (a partial tail) go to the *front* of the list;
//! * equal content is not merged: two requests that compute the same block hold two physical copies under one hash,
//!   a lookup finds the oldest copy, and each copy is evicted on its own;
//! * block 0 is a placeholder that never holds anything: a pool of n blocks has n - 1 to give.

use kvlane_index::EngineHash;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A physical block: an index into the pool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId(u32);

/// End of a linked list. Block 0 is the placeholder, so no list ever holds it.
const NIL: u32 = 0;

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Meaningful where `cached`.
    hash: u64,
    refs: u32,
    /// Neighbours in the free list, where `refs` is 0.
    free_prev: u32,
    free_next: u32,
    /// Neighbours among the copies of one hash, oldest first, where `cached`.
    copy_prev: u32,
    copy_next: u32,
    cached: bool,
}

/// The oldest and the newest copy of a hash.
#[derive(Clone, Copy)]
struct Copies {
    oldest: u32,
    newest: u32,
}

/// Engine hashes are uniform already: hashing them again would only cost time.
#[derive(Default)]
struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// The block pool of one rank.
///
/// Bounded by its number of blocks; every operation is constant time for each block that it touches.
pub struct BlockPool {
    slots: Vec<Slot>,
    free_head: u32,
    free_tail: u32,
    free: u32,
    cached: HashMap<u64, Copies, BuildHasherDefault<Uniform>>,
}

impl BlockPool {
    /// A pool of `blocks` blocks, of which one is the placeholder.
    ///
    /// # Panics
    /// If `blocks` is below 2: nothing could ever be computed.
    pub fn new(blocks: u32) -> Self {
        assert!(blocks >= 2, "a pool needs at least 2 blocks, one of them the placeholder");
        let mut pool = Self {
            slots: vec![Slot::default(); blocks as usize],
            free_head: NIL,
            free_tail: NIL,
            free: 0,
            cached: HashMap::default(),
        };
        for id in 1..blocks {
            pool.push_back(id);
        }
        pool
    }

    /// Blocks that requests can hold, all together.
    pub fn usable(&self) -> u32 {
        (self.slots.len() - 1) as u32
    }

    /// Blocks that no request holds; those of them that are cached can still be hit.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// How many leading hashes of a prompt are cached.
    pub fn cached_run(&self, chain: &[EngineHash]) -> usize {
        chain.iter().take_while(|hash| self.cached.contains_key(&hash.0)).count()
    }

    /// How many of the leading `chain` blocks (all cached) no request holds: holding them costs as many free blocks.
    pub fn unheld(&self, chain: &[EngineHash]) -> u32 {
        chain
            .iter()
            .filter(|hash| self.find(**hash).is_some_and(|id| self.slots[id as usize].refs == 0))
            .count() as u32
    }

    /// Holds the oldest copy of a cached block for one more request; `None` if it is not cached.
    pub fn hold(&mut self, hash: EngineHash) -> Option<BlockId> {
        let id = self.find(hash)?;
        if self.slots[id as usize].refs == 0 {
            self.unlink_free(id);
        }
        self.slots[id as usize].refs += 1;
        Some(BlockId(id))
    }

    /// Makes these blocks, as far as they are cached, the most recently used; whether all of them are cached.
    ///
    /// For pools whose blocks nobody holds. Of a chain the tail stays the first to be evicted.
    pub fn refresh(&mut self, chain: &[EngineHash]) -> bool {
        let mut all = true;
        for hash in chain.iter().rev() {
            match self.find(*hash) {
                Some(id) if self.slots[id as usize].refs == 0 => {
                    self.unlink_free(id);
                    self.push_back(id);
                }
                Some(_) => {}
                None => all = false,
            }
        }
        all
    }

    /// Takes `count` free blocks, least recently used first, and appends the hashes that this evicts to `evicted`.
    ///
    /// Takes nothing and returns `false` if there are not enough.
    pub fn allocate(&mut self, count: u32, blocks: &mut Vec<BlockId>, evicted: &mut Vec<EngineHash>) -> bool {
        if count > self.free {
            return false;
        }
        for _ in 0..count {
            let id = self.free_head;
            self.unlink_free(id);
            if let Some(hash) = self.uncache(id) {
                evicted.push(hash);
            }
            self.slots[id as usize].refs = 1;
            blocks.push(BlockId(id));
        }
        true
    }

    /// Makes a held block findable under `hash`, as a further copy if there are others.
    pub fn publish(&mut self, block: BlockId, hash: EngineHash) {
        let id = block.0;
        debug_assert!(self.slots[id as usize].refs > 0, "only a block that a request holds can become full");
        debug_assert!(!self.slots[id as usize].cached, "a block becomes full once in its life");
        let slot = &mut self.slots[id as usize];
        slot.hash = hash.0;
        slot.cached = true;
        slot.copy_prev = NIL;
        slot.copy_next = NIL;
        match self.cached.get_mut(&hash.0) {
            None => {
                self.cached.insert(hash.0, Copies { oldest: id, newest: id });
            }
            Some(copies) => {
                let newest = copies.newest;
                copies.newest = id;
                self.slots[newest as usize].copy_next = id;
                self.slots[id as usize].copy_prev = newest;
            }
        }
    }

    /// Gives back one request's hold on its blocks, in the order of its chain.
    pub fn release(&mut self, chain: &[BlockId]) {
        // Unhashed blocks are pushed to the front: walking from the root leaves the tail's block foremost.
        for block in chain {
            let slot = &mut self.slots[block.0 as usize];
            debug_assert!(slot.refs > 0, "a block is released as often as it was held");
            slot.refs -= 1;
            if slot.refs == 0 && !slot.cached {
                self.push_front(block.0);
            }
        }
        for block in chain.iter().rev() {
            let slot = &self.slots[block.0 as usize];
            if slot.refs == 0 && slot.cached {
                self.push_back(block.0);
            }
        }
    }

    /// Forgets every cached block; refused (`false`) while a request holds any.
    pub fn clear(&mut self) -> bool {
        if self.free != self.usable() {
            return false;
        }
        self.cached.clear();
        for slot in &mut self.slots {
            slot.cached = false;
        }
        true
    }

    /// Every cached hash with its number of physical copies, in no order.
    pub fn contents(&self) -> impl Iterator<Item = (EngineHash, u32)> + '_ {
        self.cached.iter().map(|(hash, copies)| {
            let mut count = 1;
            let mut id = copies.oldest;
            while self.slots[id as usize].copy_next != NIL {
                id = self.slots[id as usize].copy_next;
                count += 1;
            }
            (EngineHash(*hash), count)
        })
    }

    fn find(&self, hash: EngineHash) -> Option<u32> {
        self.cached.get(&hash.0).map(|copies| copies.oldest)
    }

    /// Takes a block out of the lookup; its hash, if it had one.
    fn uncache(&mut self, id: u32) -> Option<EngineHash> {
        let Slot { hash, cached, copy_prev, copy_next, .. } = self.slots[id as usize];
        if !cached {
            return None;
        }
        self.slots[id as usize].cached = false;
        if copy_prev != NIL {
            self.slots[copy_prev as usize].copy_next = copy_next;
        }
        if copy_next != NIL {
            self.slots[copy_next as usize].copy_prev = copy_prev;
        }
        if copy_prev == NIL && copy_next == NIL {
            self.cached.remove(&hash);
        } else if let Some(copies) = self.cached.get_mut(&hash) {
            if copies.oldest == id {
                copies.oldest = copy_next;
            }
            if copies.newest == id {
                copies.newest = copy_prev;
            }
        }
        Some(EngineHash(hash))
    }

    fn push_back(&mut self, id: u32) {
        let tail = self.free_tail;
        self.slots[id as usize].free_prev = tail;
        self.slots[id as usize].free_next = NIL;
        match tail {
            NIL => self.free_head = id,
            tail => self.slots[tail as usize].free_next = id,
        }
        self.free_tail = id;
        self.free += 1;
    }

    fn push_front(&mut self, id: u32) {
        let head = self.free_head;
        self.slots[id as usize].free_next = head;
        self.slots[id as usize].free_prev = NIL;
        match head {
            NIL => self.free_tail = id,
            head => self.slots[head as usize].free_prev = id,
        }
        self.free_head = id;
        self.free += 1;
    }

    fn unlink_free(&mut self, id: u32) {
        let Slot { free_prev, free_next, .. } = self.slots[id as usize];
        match free_prev {
            NIL => self.free_head = free_next,
            prev => self.slots[prev as usize].free_next = free_next,
        }
        match free_next {
            NIL => self.free_tail = free_prev,
            next => self.slots[next as usize].free_prev = free_prev,
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &mut BlockPool, hashes: &[u64]) -> (Vec<BlockId>, Vec<u64>) {
        let (mut blocks, mut evicted) = (Vec::new(), Vec::new());
        assert!(pool.allocate(hashes.len() as u32, &mut blocks, &mut evicted));
        for (block, hash) in blocks.iter().zip(hashes) {
            pool.publish(*block, EngineHash(*hash));
        }
        (blocks, evicted.iter().map(|hash| hash.0).collect())
    }

    #[test]
    fn of_a_chain_the_tail_is_evicted_first_and_of_chains_the_oldest() {
        let mut pool = BlockPool::new(7);
        let (first, _) = take(&mut pool, &[1, 2, 3]);
        let (second, _) = take(&mut pool, &[11, 12, 13]);
        pool.release(&first);
        pool.release(&second);
        assert_eq!(take(&mut pool, &[21, 22, 23, 24]).1, [3, 2, 1, 13]);
        assert_eq!(pool.cached_run(&[EngineHash(11), EngineHash(12), EngineHash(13)]), 2);
    }

    #[test]
    fn copies_are_evicted_one_by_one_and_the_hash_is_found_until_the_last() {
        let mut pool = BlockPool::new(4);
        let (first, _) = take(&mut pool, &[1, 2]);
        let (second, _) = take(&mut pool, &[2]);
        pool.release(&first);
        pool.release(&second);
        assert_eq!(pool.contents().map(|(h, n)| (h.0, n)).max(), Some((2, 2)));
        assert_eq!(take(&mut pool, &[5]).1, [2]);
        assert_eq!(pool.cached_run(&[EngineHash(1), EngineHash(2)]), 2);
        assert_eq!(take(&mut pool, &[6, 7]).1, [1, 2]);
        assert_eq!(pool.cached_run(&[EngineHash(2)]), 0);
    }

    #[test]
    fn held_blocks_are_not_evicted_and_refuse_a_clear() {
        let mut pool = BlockPool::new(3);
        let (blocks, _) = take(&mut pool, &[1, 2]);
        assert!(!pool.allocate(1, &mut Vec::new(), &mut Vec::new()));
        assert!(!pool.clear());
        pool.release(&blocks);
        assert_eq!(pool.hold(EngineHash(1)).map(|b| b == blocks[0]), Some(true));
        assert_eq!(take(&mut pool, &[9]).1, [2]);
    }

    #[test]
    fn blocks_without_a_hash_are_reused_first() {
        let mut pool = BlockPool::new(4);
        let (chain, _) = take(&mut pool, &[1, 2]);
        let mut partial = Vec::new();
        assert!(pool.allocate(1, &mut partial, &mut Vec::new()));
        let whole: Vec<BlockId> = chain.iter().chain(&partial).copied().collect();
        pool.release(&whole);
        let (next, evicted) = take(&mut pool, &[3]);
        assert_eq!((next, evicted), (partial, vec![]));
    }
}
