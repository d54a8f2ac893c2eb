//! Finds a block by an engine hash: one table for all workers.
//!
//! Most workers call a block by the same engine hash, so the table maps a hash to the block that has it as its *main*
//! name and is shared; who holds the block is written in the runs. Only the writer looks here.
//!
//! A bucket is one cache line: twelve 8-bit tags, a count of keys that did not fit, twelve slots of a block id (28 bits) and a hint
//! (4 bits). The key itself is kept with the block, far away, so nothing here reads it except to confirm a match: neither insertion nor, mostly,
//! growth. 256 sub-tables grow at different moments by about a half, so that growth neither stalls the writer nor doubles the memory at once.
//!
//! # Growth without keys
//!
//! A sub-table is 2^k groups of `width` buckets, 4 and 6 (or 5 and 7) by turns. A key's *position* is `bits` bits of its hash, then its tag;
//! its home is `position * width >> shift`: the first k bits choose the group, the others, the *fine* ones, the bucket in it. Growth from 4
//! to 6 keeps the position and changes the width; growth from 6 to 2 × 4 changes `shift` too: a fine bit becomes a group bit. Either way the new home
//! follows from the old group, the fine bits and the tag, and the hint keeps the fine bits. The keys are read again only when one fine bit is
//! left, at every third doubling, and for the few that lie outside of their home.

use super::prefetch::prefetch;
use super::shared::NONE;

const SUBS: usize = 256;
const SUB_BITS: u32 = 8;
const SLOTS: usize = 12;
const TAG_BITS: u32 = 8;
/// Bits of a slot that are the block's id.
pub(super) const ID_BITS: u32 = 28;
const ID: u32 = (1 << ID_BITS) - 1;
/// The key lies outside of its home.
const STRAY: u32 = 1 << 31;
const FINE_BITS: u32 = 3;
/// Buckets from which on a sub-table grows by halves; smaller ones double.
const HALF_STEPS_FROM: usize = 128;

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Bucket {
    /// 0 = free.
    tags: [u8; SLOTS],
    /// Keys whose home is this bucket or an earlier one, and which lie in a later one.
    passed: u32,
    slots: [u32; SLOTS],
}

const EMPTY: Bucket = Bucket { tags: [0; SLOTS], passed: 0, slots: [0; SLOTS] };

impl Bucket {
    /// The slots with this tag, as bits 0 to 11.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[expect(unsafe_code, reason = "an aligned load of the sixteen bytes that a bucket begins with")]
    fn matches(&self, tag: u8) -> u32 {
        use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_set1_epi8};
        // SAFETY: SSE2 is part of x86-64; a bucket is 64 bytes, without padding before `slots`, and aligned to 64.
        let bits = unsafe {
            let head = _mm_load_si128(std::ptr::from_ref(self).cast());
            _mm_movemask_epi8(_mm_cmpeq_epi8(head, _mm_set1_epi8(tag.cast_signed())))
        };
        bits.cast_unsigned() & 0xfff
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[inline]
    fn matches(&self, tag: u8) -> u32 {
        (0..).zip(self.tags).fold(0, |bits, (at, found)| bits | u32::from(found == tag) << at)
    }
}

#[derive(Debug)]
struct Sub {
    buckets: Box<[Bucket]>,
    live: u32,
    max: u32,
    /// Buckets in a group: `base`, or about one and a half times that.
    width: u8,
    base: u8,
    /// Bits of the hash that a position has: those of the group and the fine ones.
    bits: u8,
    fine: u8,
}

/// Engine hash → block with that main name.
#[derive(Debug)]
pub(super) struct Names {
    subs: Box<[Sub; SUBS]>,
    growths: u32,
}

/// A hash and its bucket, as long as the table does not grow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Home {
    hash: u64,
    bucket: u32,
}

/// A hash of the engine hash; engines print anything from counters to SHA-256.
#[inline]
pub(super) fn spread(name: u64) -> u64 {
    let x = (name ^ (name >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    x.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

#[inline]
fn tag(hash: u64) -> u8 {
    (hash as u8).max(1)
}

#[inline]
fn sub_of(hash: u64) -> usize {
    (hash >> (64 - SUB_BITS)) as usize
}

fn room(buckets: usize) -> u32 {
    (buckets * SLOTS * 7 / 8) as u32
}

impl Sub {
    fn new(base: u8) -> Self {
        let count = usize::from(base);
        let bits = FINE_BITS as u8;
        Self {
            buckets: vec![EMPTY; count].into(),
            live: 0,
            max: room(count),
            width: base,
            base,
            bits,
            fine: bits,
        }
    }

    #[inline]
    fn shift(&self) -> u32 {
        TAG_BITS + u32::from(self.fine)
    }

    #[inline]
    fn position(&self, hash: u64) -> u64 {
        (hash << SUB_BITS) >> (64 - self.bits) << TAG_BITS | u64::from(tag(hash))
    }

    #[inline]
    fn home(&self, position: u64) -> usize {
        ((position * u64::from(self.width)) >> self.shift()) as usize
    }

    /// The hint of a hash.
    #[inline]
    fn hint_of(&self, hash: u64) -> u32 {
        (((hash << SUB_BITS) >> (64 - self.bits)) as u32 % (1 << self.fine)) << ID_BITS
    }

    /// What a slot says beside the block.
    #[inline]
    fn hint(&self, position: u64) -> u32 {
        ((position >> TAG_BITS) as u32 & ((1 << self.fine) - 1)) << ID_BITS
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() { 0 } else { at + 1 }
    }

    /// Puts a key where there is room, from its home on.
    fn put(&mut self, position: u64, block: u32) {
        let mut at = self.home(position);
        let mut word = block | self.hint(position);
        loop {
            let bucket = &mut self.buckets[at];
            let free = bucket.matches(0);
            if free != 0 {
                let slot = free.trailing_zeros() as usize;
                bucket.tags[slot] = position as u8;
                bucket.slots[slot] = word;
                return;
            }
            bucket.passed += 1;
            word |= STRAY;
            at = self.after(at);
        }
    }

    /// Grows by one step; `hash_of` gives the hash of any block's main name.
    #[cold]
    #[inline(never)]
    fn grow(&mut self, hash_of: impl Fn(u32) -> u64) {
        let (old_width, old_shift) = (usize::from(self.width), self.shift());
        let mut read_keys = false;
        let groups = self.buckets.len() / old_width;
        let count = if self.width == self.base && self.buckets.len() >= HALF_STEPS_FROM {
            self.width += self.base / 2;
            groups * usize::from(self.width)
        } else {
            self.width = self.base;
            if self.fine > 1 {
                self.fine -= 1;
            } else {
                read_keys = true;
                self.bits += FINE_BITS as u8;
                self.fine = FINE_BITS as u8;
            }
            2 * groups * usize::from(self.width)
        };
        let old = std::mem::replace(&mut self.buckets, vec![EMPTY; count].into());
        self.max = room(count);
        // How full the new buckets are; and what goes in a second pass, so that the loads of its keys overlap.
        let mut used = vec![0u8; count];
        let mut later = Vec::with_capacity(if read_keys { self.live as usize } else { 64 });
        let mut full = Vec::new();
        for (group, buckets) in (0u64..).zip(old.chunks_exact(old_width)) {
            let group = group << old_shift;
            for bucket in buckets {
                for (&tag, &word) in bucket.tags.iter().zip(&bucket.slots) {
                    if tag == 0 {
                        continue;
                    }
                    if read_keys || word & STRAY != 0 {
                        later.push(word & ID);
                        continue;
                    }
                    let position = group | u64::from(word >> ID_BITS) << TAG_BITS | u64::from(tag);
                    let (at, hint) = (self.home(position), self.hint(position));
                    let slot = usize::from(used[at]);
                    let bucket = &mut self.buckets[at];
                    match bucket.slots.get_mut(slot) {
                        Some(free) => {
                            *free = word & ID | hint;
                            bucket.tags[slot] = tag;
                            used[at] += 1;
                        }
                        None => full.push((position, word & ID)),
                    }
                }
            }
        }
        for (position, block) in full {
            self.put(position, block);
        }
        let hashes: Vec<u64> = later.iter().map(|&block| hash_of(block)).collect();
        for (&block, &hash) in later.iter().zip(&hashes) {
            self.put(self.position(hash), block);
        }
    }
}

impl Names {
    pub(super) fn new() -> Self {
        // Two bases, so that half of the sub-tables grow while the others are between two steps.
        Self { subs: Box::new(std::array::from_fn(|i| Sub::new(4 + (i % 2) as u8))), growths: 0 }
    }

    /// Asks for the bucket of a hash, so that the loads of a batch overlap, and says where it is until the table grows.
    #[inline]
    pub(super) fn warm(&self, hash: u64) -> Home {
        let sub = &self.subs[sub_of(hash)];
        let home = sub.home(sub.position(hash));
        if let Some(bucket) = sub.buckets.get(home) {
            prefetch(bucket);
        }
        Home { hash, bucket: home as u32 }
    }

    /// Looks into a bucket that was asked for, and asks for what [`enter`](Self::enter) will need beside it: the names of blocks with the
    /// same tag (`at` says where they lie), and the next bucket if this one is full.
    #[inline]
    pub(super) fn warm_more<'n>(&self, home: Home, at: impl Fn(u32) -> &'n u64) {
        let sub = &self.subs[sub_of(home.hash)];
        let bucket = &sub.buckets[home.bucket as usize];
        let mut found = bucket.matches(tag(home.hash));
        while found != 0 {
            prefetch(at(bucket.slots[found.trailing_zeros() as usize] & ID));
            found &= found - 1;
        }
        if bucket.passed != 0 || bucket.matches(0) == 0 {
            prefetch(&sub.buckets[sub.after(home.bucket as usize)]);
        }
    }

    /// How often any part of the table has grown.
    #[inline]
    pub(super) fn growths(&self) -> u32 {
        self.growths
    }

    /// Where a hash is at home.
    #[inline]
    pub(super) fn home(&self, hash: u64) -> Home {
        let sub = &self.subs[sub_of(hash)];
        Home { hash, bucket: sub.home(sub.position(hash)) as u32 }
    }

    /// The block for which `is_it` holds, among those that may have this hash.
    #[inline]
    pub(super) fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let sub = &self.subs[sub_of(hash)];
        let home = sub.home(sub.position(hash));
        let mut at = home;
        loop {
            let bucket = &sub.buckets[at];
            let mut found = bucket.matches(tag(hash));
            while found != 0 {
                let block = bucket.slots[found.trailing_zeros() as usize] & ID;
                if is_it(block) {
                    return Some(block);
                }
                found &= found - 1;
            }
            at = sub.after(at);
            // Once around: after removals every bucket may have been passed by a key that is still there.
            if bucket.passed == 0 || at == home {
                return None;
            }
        }
    }

    /// Enters a name, or gives the block that has it already; `name_of` gives the main name of any block.
    #[inline(always)]
    pub(super) fn enter(&mut self, name: u64, home: Home, block: u32, name_of: impl Fn(u32) -> u64) -> u32 {
        let Home { hash, bucket } = home;
        let sub = &mut self.subs[sub_of(hash)];
        if sub.live == sub.max {
            self.growths += 1;
            sub.grow(|block| spread(name_of(block)));
            return self.enter_elsewhere(name, hash, block, &name_of);
        }
        let word = block | sub.hint_of(hash);
        let bucket = &mut sub.buckets[bucket as usize];
        let mut found = bucket.matches(tag(hash));
        while found != 0 {
            let other = bucket.slots[found.trailing_zeros() as usize] & ID;
            if name_of(other) == name {
                return other;
            }
            found &= found - 1;
        }
        let free = bucket.matches(0);
        if bucket.passed == 0 && free != 0 {
            let slot = free.trailing_zeros() as usize;
            bucket.tags[slot] = tag(hash);
            bucket.slots[slot] = word;
            sub.live += 1;
            return NONE;
        }
        self.enter_elsewhere(name, hash, block, &name_of)
    }

    /// The rest of [`enter`](Self::enter): in a home that is full or was.
    #[inline(never)]
    fn enter_elsewhere(&mut self, name: u64, hash: u64, block: u32, name_of: &dyn Fn(u32) -> u64) -> u32 {
        if let Some(other) = self.find(hash, |other| name_of(other) == name) {
            return other;
        }
        let sub = &mut self.subs[sub_of(hash)];
        sub.live += 1;
        sub.put(sub.position(hash), block);
        NONE
    }

    #[inline]
    pub(super) fn remove(&mut self, home: Home, block: u32) {
        let Home { hash, bucket } = home;
        let sub = &mut self.subs[sub_of(hash)];
        let home = bucket as usize;
        let tag = tag(hash);
        let mut at = home;
        loop {
            let bucket = &mut sub.buckets[at];
            let mut found = bucket.matches(tag);
            while found != 0 {
                let slot = found.trailing_zeros() as usize;
                if bucket.slots[slot] & ID == block {
                    bucket.tags[slot] = 0;
                    sub.live -= 1;
                    let mut passed = home;
                    while passed != at {
                        sub.buckets[passed].passed -= 1;
                        passed = sub.after(passed);
                    }
                    return;
                }
                found &= found - 1;
            }
            let passed = bucket.passed;
            at = sub.after(at);
            if passed == 0 || at == home {
                debug_assert!(false, "a main name is in the table");
                return;
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        let sub = |s: &Sub| size_of::<Sub>() + s.buckets.len() * size_of::<Bucket>();
        self.subs.iter().map(sub).sum::<usize>() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A router in steady traffic hung: where keys come and go, each bucket of a small table can be passed by a key that is still there, and whoever looked for
    /// a name that is not went round for ever.
    #[test]
    fn a_search_ends_where_every_bucket_was_passed() {
        let mut names = Names::new();
        let name_of = u64::from;
        let count = names.subs[0].buckets.len();
        let mut candidates = (0..u32::MAX >> 4).filter(|block| sub_of(spread(name_of(*block))) == 0);
        for bucket in 0..count {
            // One key too many for this bucket; all but the one that lies behind it go again.
            let mut here = Vec::new();
            while names.subs[0].buckets[bucket].passed == 0 {
                let block = candidates.next().unwrap();
                let home = names.home(spread(name_of(block)));
                if home.bucket as usize == bucket {
                    assert_eq!(names.enter(name_of(block), home, block, name_of), NONE);
                    here.push(block);
                }
            }
            here.pop();
            here.into_iter().for_each(|block| names.remove(names.home(spread(name_of(block))), block));
        }
        assert!(names.subs[0].buckets.iter().all(|bucket| bucket.passed > 0));
        assert_eq!(names.subs[0].buckets.len(), count, "it did not grow");
        let absent = candidates.next().unwrap();
        assert_eq!(names.find(spread(name_of(absent)), |block| block == absent), None);
        let home = names.home(spread(name_of(absent)));
        assert_eq!(names.enter(name_of(absent), home, absent, name_of), NONE);
        assert_eq!(names.find(spread(name_of(absent)), |block| block == absent), Some(absent));
    }

    #[test]
    fn names_survive_growth_and_removal_of_others() {
        // Each third name is shared by two blocks: the first keeps it.
        let name_of = |block: u32| u64::from(block % 200_000) << 20;
        let mut names = Names::new();
        for block in 0..300_000 {
            let owner = names.enter(name_of(block), names.home(spread(name_of(block))), block, name_of);
            assert_eq!(owner, if block < 200_000 { NONE } else { block - 200_000 });
        }
        for block in (0..200_000).step_by(2) {
            names.remove(names.home(spread(name_of(block))), block);
        }
        for block in 0..200_000 {
            let found = names.find(spread(name_of(block)), |b| b == block);
            assert_eq!(found.is_some(), block % 2 == 1, "block {block}");
        }
        for block in 0..200_000 {
            let owner = names.enter(name_of(block), names.home(spread(name_of(block))), block, name_of);
            assert_eq!(owner, if block % 2 == 0 { NONE } else { block });
        }
        let slots: usize = names.subs.iter().map(|sub| sub.buckets.len() * SLOTS).sum();
        assert!(slots < 400_000, "{slots} slots for 200,000 names");
    }

    #[test]
    fn tags_are_matched() {
        let mut bucket = Bucket { passed: 0x0505_0505, ..EMPTY };
        bucket.tags = [5, 0, 1, 3, 5, 0, 5, 7, 5, 1, 5, 0];
        for tag in [0, 1, 3, 5, 7, 9] {
            let wanted = (0..SLOTS).filter(|&i| bucket.tags[i] == tag).fold(0, |bits, i| bits | 1 << i);
            assert_eq!(bucket.matches(tag), wanted, "{tag}");
        }
    }
}
