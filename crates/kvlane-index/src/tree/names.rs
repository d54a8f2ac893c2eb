//! Finds a block by an engine hash: one table for all workers.
//!
//! Most workers call a block by the same engine hash, so the table maps a hash to the block that has it as its *main*
//! name and is shared; who holds the block is written in the runs. Buckets are one cache line: twelve 8-bit tags, a
//! count of keys that did not fit, twelve block ids. The key itself is kept with the block. 256 sub-tables grow at different moments, so that
//! growth neither stalls the writer nor doubles the memory at once. Only the writer looks here.

const SUBS: usize = 256;
const SLOTS: usize = 12;

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Bucket {
    tags: [u8; SLOTS],
    /// Keys whose home is this bucket or an earlier one, and which lie in a later one.
    passed: u32,
    blocks: [u32; SLOTS],
}

const EMPTY: Bucket = Bucket { tags: [0; SLOTS], passed: 0, blocks: [0; SLOTS] };

impl Bucket {
    /// The slots with this tag, as bits 0 to 11.
    #[inline]
    fn matches(&self, tag: u8) -> u32 {
        let mut bits = 0;
        for (i, &t) in self.tags.iter().enumerate() {
            bits |= u32::from(t == tag) << i;
        }
        bits
    }
}

#[derive(Debug)]
struct Sub {
    buckets: Vec<Bucket>,
    live: u32,
    max: u32,
}

/// Engine hash → block with that main name.
#[derive(Debug)]
pub(super) struct Names {
    subs: Vec<Sub>,
}

/// A hash of the engine hash; engines print anything from counters to SHA-256.
#[inline]
pub(super) fn spread(name: u64) -> u64 {
    let x = (name ^ (name >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    x.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn tag(hash: u64) -> u8 {
    (hash as u8).max(1)
}

fn room(buckets: usize) -> u32 {
    (buckets * SLOTS * 86 / 100) as u32
}

#[inline]
fn home(hash: u64, buckets: usize) -> usize {
    ((u128::from(hash << 8) * buckets as u128) >> 64) as usize
}

impl Names {
    pub(super) fn new() -> Self {
        let sub = |i: usize| {
            // Sizes spread evenly over one step of growth.
            let buckets = 4 + i * 4 / SUBS;
            Sub { buckets: vec![EMPTY; buckets], live: 0, max: room(buckets) }
        };
        Self { subs: (0..SUBS).map(sub).collect() }
    }

    /// Reads the bucket of a hash and forgets it: the loads of a batch overlap instead of waiting for one another.
    #[inline]
    pub(super) fn warm(&self, hash: u64) -> u32 {
        let sub = &self.subs[(hash >> 56) as usize];
        sub.buckets[home(hash, sub.buckets.len())].passed
    }

    /// The block for which `is_it` holds, among those that may have this hash.
    #[inline]
    pub(super) fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let sub = &self.subs[(hash >> 56) as usize];
        let tag = tag(hash);
        let mut at = home(hash, sub.buckets.len());
        loop {
            let bucket = &sub.buckets[at];
            let mut found = bucket.matches(tag);
            while found != 0 {
                let block = bucket.blocks[found.trailing_zeros() as usize];
                if is_it(block) {
                    return Some(block);
                }
                found &= found - 1;
            }
            if bucket.passed == 0 {
                return None;
            }
            at = if at + 1 == sub.buckets.len() { 0 } else { at + 1 };
        }
    }

    /// Enters a name that is not there; `hash_of` gives the hash of any block's main name.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, block: u32, hash_of: impl Fn(u32) -> u64) {
        let sub = &mut self.subs[(hash >> 56) as usize];
        if sub.live == sub.max {
            grow(sub, hash_of);
        }
        sub.live += 1;
        put(&mut sub.buckets, hash, block);
    }

    #[inline]
    pub(super) fn remove(&mut self, hash: u64, block: u32) {
        let sub = &mut self.subs[(hash >> 56) as usize];
        let count = sub.buckets.len();
        let start = home(hash, count);
        let tag = tag(hash);
        let mut at = start;
        loop {
            let bucket = &mut sub.buckets[at];
            let mut found = bucket.matches(tag);
            while found != 0 {
                let slot = found.trailing_zeros() as usize;
                if bucket.blocks[slot] == block {
                    bucket.tags[slot] = 0;
                    sub.live -= 1;
                    let mut passed = start;
                    while passed != at {
                        sub.buckets[passed].passed -= 1;
                        passed = if passed + 1 == count { 0 } else { passed + 1 };
                    }
                    return;
                }
                found &= found - 1;
            }
            if bucket.passed == 0 {
                debug_assert!(false, "a main name is in the table");
                return;
            }
            at = if at + 1 == count { 0 } else { at + 1 };
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.subs.iter().map(|s| s.buckets.capacity() * size_of::<Bucket>()).sum::<usize>() as u64
    }
}

fn put(buckets: &mut [Bucket], hash: u64, block: u32) {
    let count = buckets.len();
    let mut at = home(hash, count);
    loop {
        let bucket = &mut buckets[at];
        let free = bucket.matches(0);
        if free != 0 {
            let slot = free.trailing_zeros() as usize;
            bucket.tags[slot] = tag(hash);
            bucket.blocks[slot] = block;
            return;
        }
        bucket.passed += 1;
        at = if at + 1 == count { 0 } else { at + 1 };
    }
}

#[cold]
fn grow(sub: &mut Sub, hash_of: impl Fn(u32) -> u64) {
    let count = sub.buckets.len() + sub.buckets.len() * 2 / 5;
    let old = std::mem::replace(&mut sub.buckets, vec![EMPTY; count]);
    sub.max = room(count);
    // Two passes, so that the loads of the keys overlap.
    let blocks: Vec<u32> = old
        .iter()
        .flat_map(|b| b.tags.iter().zip(b.blocks).filter(|(t, _)| **t != 0).map(|(_, block)| block))
        .collect();
    let hashes: Vec<u64> = blocks.iter().map(|&b| hash_of(b)).collect();
    for (&block, &hash) in blocks.iter().zip(&hashes) {
        put(&mut sub.buckets, hash, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_growth_and_removal_of_others() {
        let mut names = Names::new();
        let hash_of = |block: u32| spread(u64::from(block % 50_000));
        for block in 0..50_000 {
            names.insert(hash_of(block), block, hash_of);
        }
        for block in (0..50_000).step_by(2) {
            names.remove(hash_of(block), block);
        }
        for block in 0..50_000 {
            let found = names.find(hash_of(block), |b| b == block);
            assert_eq!(found.is_some(), block % 2 == 1, "block {block}");
        }
    }
}
