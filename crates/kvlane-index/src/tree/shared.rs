//! What readers see: run headers, prefix hashes, lists, and the directory of ranks.
//!
//! # Layout of a run's header (eight words, one cache line)
//!
//! | word | content |
//! |---|---|
//! | 0 | version (32 bits, odd while the writer changes the run), length in blocks (24), kind of the set (8) |
//! | 1, 2 | prefix hash of the first and of the last block |
//! | 3 | place of the first block inside its page (32), offset of the page list (32) |
//! | 4, 5 | the ranks that hold all of the run in the device tier, group 0 (see [`SetKind`]) |
//! | 6 | list of part coverages: everything else that is held |
//! | 7 | list of predictions |
//!
//! A list word is offset (32), count (24), size class (8); 0 = no list. An item of the part list is rank (20), class (11), 1 if a
//! bitmap (1), blocks from the start of the run or offset of the bitmap (32). An item of the prediction list is two words:
//! rank (32) and blocks (32), then the deadline.
//!
//! # Protocol
//!
//! The one writer makes the version odd, changes the run, and makes it even again. A reader notes word 0 of each run on its path, and looks
//! at all of them again at the end: if each is even and unchanged, all that it read was true at one moment, the one
//! between its last read and the first check.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

use super::run_table::RunTable;
use super::words::Words;
use crate::prefix::PrefixHasher;
use crate::{GroupKind, IndexConfig, Tier, Worker};

/// No block, run or rank.
pub(super) const NONE: u32 = u32::MAX;
/// Blocks in a page of prefix hashes.
pub(super) const PAGE: u32 = 16;
pub(super) const HEADER: u32 = 8;
/// Worker ranks of a partition; the events of more are refused.
pub(super) const MAX_RANKS: u32 = 1 << 14;
/// (rank, tier, group) triples of a partition, so that no part list outgrows the largest block of the slab.
pub(super) const MAX_TRIPLES: u32 = 1 << 15;
/// Distinct group ids in a partition.
pub(super) const MAX_GROUPS: usize = 1 << 9;
/// Blocks of one run.
pub(super) const MAX_RUN: u32 = 1 << 20;

pub(super) const VERSION: u64 = 1 << 32;

/// A tier and a group, interned: 11 bits. Class 0 is the device tier of group 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Class(pub(super) u32);

impl Class {
    pub(super) const PRIMARY: Self = Self(0);

    pub(super) fn new(tier: Tier, group_index: usize) -> Self {
        Self((tier as u32) << 9 | group_index as u32)
    }

    pub(super) fn tier(self) -> Tier {
        Tier::ALL[(self.0 >> 9) as usize & 3]
    }

    pub(super) fn group_index(self) -> usize {
        self.0 as usize & (MAX_GROUPS - 1)
    }
}

/// How words 4 and 5 of a header tell a set of ranks.
pub(super) struct SetKind;

impl SetKind {
    /// 128 bits, for ranks below 128.
    pub(super) const INLINE: u64 = 0;
    /// Up to four ranks of 32 bits, `NONE` where there is none.
    pub(super) const LIST: u64 = 1;
    /// Offset (32) and count of words (32) of a bitmap in the slab.
    pub(super) const BITMAP: u64 = 2;
}

#[inline]
pub(super) fn length(word0: u64) -> u32 {
    (word0 >> 8) as u32 & 0xff_ffff
}

#[inline]
pub(super) fn set_kind(word0: u64) -> u64 {
    word0 & 0xff
}

/// Offset and count of a list word.
#[inline]
pub(super) fn list(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, (word >> 8) as u32 & 0xff_ffff)
}

/// One item of a part list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) rank: u32,
    pub(super) class: Class,
    pub(super) bitmap: bool,
    /// Blocks, or offset of the bitmap: its count of words, then the words.
    pub(super) value: u32,
}

impl Part {
    #[inline]
    pub(super) fn decode(word: u64) -> Self {
        Self {
            rank: (word >> 44) as u32,
            class: Class((word >> 33) as u32 & 0x7ff),
            bitmap: word >> 32 & 1 == 1,
            value: word as u32,
        }
    }

    pub(super) fn encode(self) -> u64 {
        u64::from(self.rank) << 44
            | u64::from(self.class.0) << 33
            | u64::from(self.bitmap) << 32
            | u64::from(self.value)
    }
}

/// What a group needs, in one word of a rank's class list: class (11), kind, window in tokens (32).
pub(super) fn encode_kind(class: Class, kind: GroupKind) -> u64 {
    let (tag, window) = match kind {
        GroupKind::Full => (0, 0),
        GroupKind::Sliding { window_tokens } => (1, window_tokens),
        GroupKind::Recurrent => (2, 0),
    };
    u64::from(class.0) << 48 | tag << 32 | u64::from(window)
}

pub(super) fn decode_kind(word: u64) -> (Class, GroupKind) {
    let kind = match word >> 32 & 0xffff {
        0 => GroupKind::Full,
        1 => GroupKind::Sliding { window_tokens: word as u32 },
        _ => GroupKind::Recurrent,
    };
    (Class((word >> 48) as u32 & 0x7ff), kind)
}

/// The ranks in the order of their workers: two words each, instance; DP rank (32), hybrid (1), index (31). The same by index.
///
/// A *hybrid* rank has shown another group of the device tier than group 0 with full attention: its hits are not depths in the runs' sets.
#[derive(Debug)]
pub(super) struct Directory {
    /// Odd while the directory changes.
    version: AtomicU64,
    ranks: AtomicU32,
    /// One past the largest index in use.
    bits: AtomicU32,
    hybrid: AtomicU32,
    order: Words,
    /// For each rank index, its two words.
    by_index: Words,
    /// For each rank index: list of kinds, in the slab (as a list word).
    kinds: Words,
}

/// One line of the directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) worker: Worker,
    pub(super) hybrid: bool,
    pub(super) index: u32,
}

impl Directory {
    fn new() -> Self {
        let order = Words::flat(2 * MAX_RANKS);
        let kinds = Words::flat(MAX_RANKS);
        Self {
            version: AtomicU64::new(0),
            ranks: AtomicU32::new(0),
            bits: AtomicU32::new(0),
            hybrid: AtomicU32::new(0),
            by_index: Words::flat(2 * MAX_RANKS),
            order,
            kinds,
        }
    }

    #[inline]
    pub(super) fn version(&self) -> u64 {
        self.version.load(Acquire)
    }

    #[inline]
    pub(super) fn len(&self) -> u32 {
        self.ranks.load(Relaxed)
    }

    /// One past the largest index in use.
    #[inline]
    pub(super) fn bits(&self) -> u32 {
        self.bits.load(Relaxed).min(MAX_RANKS)
    }

    #[inline]
    pub(super) fn has_hybrid(&self) -> bool {
        self.hybrid.load(Relaxed) > 0
    }

    pub(super) fn kinds_of(&self, index: u32) -> u64 {
        self.kinds.get(index)
    }

    /// The ranks, sorted by worker.
    #[inline]
    pub(super) fn iter(&self) -> impl Iterator<Item = Listed> {
        let ranks = self.len().min(MAX_RANKS) as usize;
        let pairs = self.order.from(0).as_chunks::<2>().0;
        pairs[..ranks.min(pairs.len())].iter().map(|[instance, rest]| {
            let (instance, rest) = (instance.load(Relaxed), rest.load(Relaxed));
            Listed {
                worker: Worker::new(instance, (rest >> 32) as u32),
                hybrid: rest >> 31 & 1 == 1,
                index: rest as u32 & 0x7fff_ffff,
            }
        })
    }

    /// The worker with an index; any worker, if the index is not in use.
    #[inline]
    pub(super) fn worker(&self, index: u32) -> Worker {
        let words = self.by_index.from(index.wrapping_mul(2));
        let word = |at: usize| words.get(at).map_or(0, |word| word.load(Relaxed));
        Worker::new(word(0), (word(1) >> 32) as u32)
    }

    /// The workers by index; any worker where the index is not in use.
    pub(super) fn workers(&self) -> impl Iterator<Item = Worker> {
        (0..self.bits()).map(|index| self.worker(index))
    }

    /// The writer replaces the whole directory.
    pub(super) fn publish(&self, ranks: &[Listed], kinds_of: impl Fn(u32) -> u64) {
        let version = self.version.load(Relaxed);
        self.version.store(version + 1, Relaxed);
        fence(Release);
        self.order.reach(0);
        self.by_index.reach(0);
        self.kinds.reach(0);
        for (at, listed) in (0u32..).zip(ranks) {
            let Listed { worker, hybrid, index } = *listed;
            let rest = u64::from(worker.rank) << 32 | u64::from(hybrid) << 31 | u64::from(index);
            for (words, at) in [(&self.order, at), (&self.by_index, index)] {
                words.set(2 * at, worker.instance.0);
                words.set(2 * at + 1, rest);
            }
            self.kinds.set(index, kinds_of(index));
        }
        self.ranks.store(ranks.len() as u32, Relaxed);
        self.bits.store(ranks.iter().map(|l| l.index + 1).max().unwrap_or(0), Relaxed);
        self.hybrid.store(ranks.iter().filter(|l| l.hybrid).count() as u32, Relaxed);
        self.version.store(version + 2, Release);
    }
}

/// Everything that readers may look at.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) hasher: PrefixHasher,
    pub(super) block_tokens: u32,
    pub(super) table: RunTable,
    pub(super) headers: Words,
    /// Prefix hashes, by block id.
    pub(super) prefixes: Words,
    pub(super) slab: Words,
    pub(super) directory: Directory,
}

impl Shared {
    pub(super) fn new(config: &IndexConfig) -> Self {
        Self {
            hasher: PrefixHasher::new(config.prefix_key),
            block_tokens: config.block_size.tokens(),
            table: RunTable::new(),
            headers: Words::new(1 << 11),
            prefixes: Words::new(1 << 12),
            slab: Words::new(1 << 12),
            directory: Directory::new(),
        }
    }

    pub(crate) fn hasher(&self) -> &PrefixHasher {
        &self.hasher
    }

    /// The eight words of a header; empty for a run that never was.
    #[inline]
    pub(super) fn header(&self, run: u32) -> &[AtomicU64] {
        let words = self.headers.from(run.wrapping_mul(HEADER));
        words.get(..HEADER as usize).unwrap_or(&[])
    }

    /// Id of block `at` of a run with this word 3.
    #[inline]
    pub(super) fn block_at(&self, word3: u64, at: u32) -> u32 {
        let i = (word3 >> 32) as u32 + at;
        let page = i / PAGE;
        let pair = self.slab.get((word3 as u32).wrapping_add(page / 2));
        ((pair >> (32 * (page % 2))) as u32).wrapping_mul(PAGE) + i % PAGE
    }

    /// Prefix hash of block `at` of a run with this word 3.
    #[inline]
    pub(super) fn prefix_at(&self, word3: u64, at: u32) -> u64 {
        self.prefixes.get(self.block_at(word3, at))
    }

    /// Items of a list.
    #[inline]
    pub(super) fn items(&self, word: u64) -> &[AtomicU64] {
        let (at, count) = list(word);
        if count == 0 {
            return &[];
        }
        let words = self.slab.from(at);
        &words[..words.len().min(count as usize)]
    }

    /// Whether a set with these words contains a rank.
    #[inline]
    pub(super) fn set_has(&self, kind: u64, words: [u64; 2], rank: u32) -> bool {
        match kind {
            SetKind::INLINE => rank < 128 && words[rank as usize / 64] >> (rank % 64) & 1 == 1,
            SetKind::LIST => words.iter().any(|w| *w as u32 == rank || (*w >> 32) as u32 == rank),
            _ => {
                let (at, count) = ((words[0] >> 32) as u32, words[0] as u32);
                rank / 64 < count && self.slab.get(at + rank / 64) >> (rank % 64) & 1 == 1
            }
        }
    }

    /// Calls `each` for every rank of a set.
    pub(super) fn set_each(&self, kind: u64, words: [u64; 2], mut each: impl FnMut(u32)) {
        let mut bits = |at: usize, mut word: u64| {
            while word != 0 {
                each(at as u32 * 64 + word.trailing_zeros());
                word &= word - 1;
            }
        };
        match kind {
            SetKind::INLINE => {
                bits(0, words[0]);
                bits(1, words[1]);
            }
            SetKind::LIST => {
                for rank in words.iter().flat_map(|w| [*w as u32, (*w >> 32) as u32]) {
                    if rank != NONE {
                        each(rank);
                    }
                }
            }
            _ => {
                let bitmap = self.slab.from((words[0] >> 32) as u32);
                for (at, word) in bitmap.iter().take(words[0] as u32 as usize).enumerate() {
                    bits(at, word.load(Relaxed));
                }
            }
        }
    }

    /// Whether a bitmap has a bit.
    #[inline]
    pub(super) fn bit(&self, bitmap: u32, at: u32) -> bool {
        u64::from(at / 64) < self.slab.get(bitmap)
            && self.slab.get(bitmap + 1 + at / 64) >> (at % 64) & 1 == 1
    }

    /// First clear bit of a bitmap at or after `from`.
    pub(super) fn first_clear(&self, bitmap: u32, from: u32) -> u32 {
        let words = self.slab.get(bitmap).min(1 << 16) as u32;
        let mut at = from;
        while at / 64 < words {
            let rest = !self.slab.get(bitmap + 1 + at / 64) >> (at % 64);
            if rest != 0 {
                return at + rest.trailing_zeros();
            }
            at = (at / 64 + 1) * 64;
        }
        at
    }
}
