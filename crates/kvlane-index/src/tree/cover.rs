//! Who holds what of a run.
//!
//! A rank that holds all of a run in the device tier, group 0, is a bit in the run's set. Everything else (a beginning, a stretch
//! with holes, another class) is an item of the part list: a count of blocks from the start, or a bitmap. An item that
//! has come to cover the run in the first class becomes a bit, so that equal holdings look equal.

use std::sync::atomic::Ordering::*;

use super::Tree;
use super::runs::Meta;
use super::shared::{Class, NONE, Part, SetKind, list, set_kind};
use super::words::class_of;

/// What a rank holds of a run in one class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cover {
    None,
    Full,
    /// The item's number in the part list, and the item.
    Part(u32, Part),
}

impl Cover {
    /// Whether it has no holes: with a block, it has those before it.
    pub(super) fn is_beginning(self) -> bool {
        !matches!(self, Self::Part(_, Part { bitmap: true, .. }))
    }
}

/// Sets or clears bits `from..to`.
fn mark(bits: &mut [u64], from: u32, to: u32, value: bool) {
    let mut at = from;
    while at < to {
        let here = (64 - at % 64).min(to - at);
        let mask = (u64::MAX >> (64 - here)) << (at % 64);
        if value {
            bits[at as usize / 64] |= mask;
        } else {
            bits[at as usize / 64] &= !mask;
        }
        at += here;
    }
}

fn ones(bits: &[u64]) -> u32 {
    bits.iter().map(|w| w.count_ones()).sum()
}

fn leading(bits: &[u64]) -> u32 {
    let whole = bits.iter().take_while(|w| **w == u64::MAX).count();
    whole as u32 * 64 + bits.get(whole).map_or(0, |w| w.trailing_ones())
}

impl Tree {
    // ---- the set of full holders ---------------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn in_full(&self, run: u32, rank: u32) -> bool {
        let header = self.shared.header(run);
        let kind = set_kind(header[0].load(Relaxed));
        self.shared.set_has(kind, [header[4].load(Relaxed), header[5].load(Relaxed)], rank)
    }

    fn full_ranks(&self, run: u32) -> Vec<u32> {
        let mut ranks = Vec::with_capacity(self.metas[run as usize].full as usize);
        let set = [self.word(run, 4), self.word(run, 5)];
        self.shared.set_each(set_kind(self.word(run, 0)), set, |rank| ranks.push(rank));
        ranks
    }

    /// Replaces a set. The run is open; returns the new kind.
    fn write_set(&mut self, run: u32, ranks: &[u32]) -> u64 {
        let top = ranks.iter().copied().max().unwrap_or(0);
        let mut words = [0; 2];
        let kind = if top < 128 {
            for rank in ranks {
                words[*rank as usize / 64] |= 1 << (rank % 64);
            }
            SetKind::INLINE
        } else if ranks.len() <= 4 {
            let rank = |i: usize| u64::from(ranks.get(i).copied().unwrap_or(NONE));
            words = [rank(0) | rank(1) << 32, rank(2) | rank(3) << 32];
            SetKind::LIST
        } else {
            let mut bits = vec![0; top as usize / 64 + 1];
            for rank in ranks {
                bits[*rank as usize / 64] |= 1 << (rank % 64);
            }
            let class = class_of(bits.len() as u32);
            let at = self.take(class);
            bits.resize(1 << class, 0);
            for (i, word) in (at..).zip(&bits) {
                self.shared.slab.set(i, *word);
            }
            words[0] = u64::from(at) << 32 | 1 << class;
            SetKind::BITMAP
        };
        self.set_word(run, 4, words[0]);
        self.set_word(run, 5, words[1]);
        self.metas[run as usize].full = ranks.len() as u32;
        kind
    }

    fn free_set(&mut self, kind: u64, words: [u64; 2]) {
        if kind == SetKind::BITMAP {
            self.slab.give((words[0] >> 32) as u32, class_of(words[0] as u32));
        }
    }

    /// Gives a new run a copy of a set.
    pub(super) fn copy_set(&mut self, run: u32, kind: u64, mut words: [u64; 2]) {
        let mut full = 0;
        self.shared.set_each(kind, words, |_| full += 1);
        if kind == SetKind::BITMAP {
            let (from, count) = ((words[0] >> 32) as u32, words[0] as u32);
            let at = self.take(class_of(count));
            for i in 0..count {
                self.shared.slab.set(at + i, self.shared.slab.get(from + i));
            }
            words[0] = u64::from(at) << 32 | u64::from(count);
        }
        let len = self.len(run);
        self.open(run);
        self.set_word(run, 4, words[0]);
        self.set_word(run, 5, words[1]);
        self.close(run, len, kind);
        self.metas[run as usize].full = full;
        for rank in self.full_ranks(run) {
            self.enters(rank, run);
        }
    }

    /// Adds a rank to the set or takes it out. The run is open; returns the new kind.
    fn change_set(&mut self, run: u32, kind: u64, rank: u32, add: bool) -> u64 {
        let words = [self.word(run, 4), self.word(run, 5)];
        match kind {
            SetKind::INLINE if rank < 128 => {
                let bit = 1u64 << (rank % 64);
                let at = rank as usize / 64;
                self.set_word(run, 4 + at, if add { words[at] | bit } else { words[at] & !bit });
            }
            SetKind::BITMAP if rank / 64 < words[0] as u32 && (add || self.metas[run as usize].full > 3) => {
                let at = (words[0] >> 32) as u32 + rank / 64;
                let (old, bit) = (self.shared.slab.get(at), 1u64 << (rank % 64));
                self.shared.slab.set(at, if add { old | bit } else { old & !bit });
            }
            _ => {
                let mut ranks = self.full_ranks_of(kind, words);
                if add {
                    ranks.push(rank);
                } else {
                    ranks.retain(|r| *r != rank);
                }
                let new_kind = self.write_set(run, &ranks);
                self.free_set(kind, words);
                return new_kind;
            }
        }
        let full = &mut self.metas[run as usize].full;
        *full = if add { *full + 1 } else { *full - 1 };
        kind
    }

    fn full_ranks_of(&self, kind: u64, words: [u64; 2]) -> Vec<u32> {
        let mut ranks = Vec::new();
        self.shared.set_each(kind, words, |rank| ranks.push(rank));
        ranks
    }

    // ---- covers --------------------------------------------------------------------------------------------------------------------

    fn find_part(&self, run: u32, rank: u32, class: Class) -> Option<(u32, Part)> {
        let items = self.shared.items(self.word(run, 6));
        let key = u64::from(rank) << 11 | u64::from(class.0);
        let at = items.iter().position(|item| item.load(Relaxed) >> 33 == key)?;
        Some((at as u32, Part::decode(items[at].load(Relaxed))))
    }

    #[inline]
    pub(super) fn cover(&self, run: u32, rank: u32, class: Class) -> Cover {
        if class == Class::PRIMARY && self.in_full(run, rank) {
            return Cover::Full;
        }
        if self.word(run, 6) == 0 {
            return Cover::None;
        }
        self.find_part(run, rank, class).map_or(Cover::None, |(at, part)| Cover::Part(at, part))
    }

    pub(super) fn covers(&self, cover: Cover, at: u32) -> bool {
        match cover {
            Cover::None => false,
            Cover::Full => true,
            Cover::Part(_, Part { bitmap: false, value, .. }) => at < value,
            Cover::Part(_, Part { bitmap: true, value, .. }) => self.shared.bit(value, at),
        }
    }

    /// The first block at or after `from`, and before `to`, that is covered; `to` if there is none.
    pub(super) fn first_covered(&self, cover: Cover, from: u32, to: u32) -> u32 {
        match cover {
            Cover::None => to,
            Cover::Part(_, Part { bitmap: false, value, .. }) if value <= from => to,
            Cover::Full | Cover::Part(_, Part { bitmap: false, .. }) => from,
            Cover::Part(..) => (from..to).find(|&at| self.covers(cover, at)).unwrap_or(to),
        }
    }

    #[inline]
    pub(super) fn holds(&self, run: u32, at: u32, rank: u32, class: Class) -> bool {
        self.covers(self.cover(run, rank, class), at)
    }

    /// Whether a rank has anything in a run.
    pub(super) fn has_any(&self, run: u32, rank: u32) -> bool {
        self.len(run) > 0
            && (self.in_full(run, rank)
                || self
                    .shared
                    .items(self.word(run, 6))
                    .iter()
                    .any(|i| Part::decode(i.load(Relaxed)).rank == rank)
                || self.predicted_end(run, rank) > 0)
    }

    /// One past the last block that anyone holds, by the part list and predictions (call it for runs without full holders).
    pub(super) fn held_end(&self, run: u32) -> u32 {
        let part_end = |part: Part| match part.bitmap {
            false => part.value,
            true => {
                let words = self.shared.slab.get(part.value) as u32;
                (0..words)
                    .rev()
                    .map(|w| (w, self.shared.slab.get(part.value + 1 + w)))
                    .find(|(_, bits)| *bits != 0)
                    .map_or(0, |(w, bits)| w * 64 + 64 - bits.leading_zeros())
            }
        };
        let parts =
            self.shared.items(self.word(run, 6)).iter().map(|i| part_end(Part::decode(i.load(Relaxed))));
        parts.max().unwrap_or(0).max(self.predictions_end(run))
    }

    fn cover_bits(&self, run: u32, cover: Cover) -> Vec<u64> {
        let mut bits = vec![0; self.len(run).div_ceil(64) as usize];
        match cover {
            Cover::None => {}
            Cover::Full => mark(&mut bits, 0, self.len(run), true),
            Cover::Part(_, Part { bitmap: false, value, .. }) => mark(&mut bits, 0, value, true),
            Cover::Part(_, Part { bitmap: true, value, .. }) => {
                let words = (self.shared.slab.get(value) as usize).min(bits.len());
                for (i, word) in (value + 1..).zip(&mut bits[..words]) {
                    *word = self.shared.slab.get(i);
                }
            }
        }
        bits
    }

    fn free_bitmap(&mut self, part: Part) {
        if part.bitmap {
            let words = self.shared.slab.get(part.value) as u32;
            self.slab.give(part.value, class_of(words + 1));
        }
    }

    fn make_bitmap(&mut self, bits: &[u64]) -> u32 {
        let at = self.take(class_of(bits.len() as u32 + 1));
        self.shared.slab.set(at, bits.len() as u64);
        for (i, word) in (at + 1..).zip(bits) {
            self.shared.slab.set(i, *word);
        }
        at
    }

    /// Replaces what a rank holds in a class by the blocks `0..prefix` or by `bits`.
    fn put(&mut self, run: u32, rank: u32, class: Class, old: Cover, prefix: u32, bits: Option<&[u64]>) {
        let (len, word0) = (self.len(run), self.word(run, 0));
        let mut kind = set_kind(word0);
        let full = bits.is_none() && prefix == len && class == Class::PRIMARY;
        let new = match bits {
            None if full || prefix == 0 => None,
            None => Some(Part { rank, class, bitmap: false, value: prefix }),
            Some(bits) => Some(Part { rank, class, bitmap: true, value: self.make_bitmap(bits) }),
        };
        self.open(run);
        if full != (old == Cover::Full) {
            kind = self.change_set(run, kind, rank, full);
        }
        let parts = self.word(run, 6);
        match (old, new) {
            (Cover::Part(at, part), Some(new)) => {
                self.shared.slab.set(list(parts).0 + at, new.encode());
                self.free_bitmap(part);
            }
            (Cover::Part(at, part), None) => {
                let parts = self.list_remove(parts, at);
                self.set_word(run, 6, parts);
                self.free_bitmap(part);
            }
            (_, Some(new)) => {
                let parts = self.list_push(parts, &[new.encode()]);
                self.set_word(run, 6, parts);
            }
            (_, None) => {}
        }
        self.close(run, len, kind);
        if old == Cover::None {
            self.enters(rank, run);
        }
    }

    fn put_bits(&mut self, run: u32, rank: u32, class: Class, old: Cover, bits: &[u64]) {
        let first = leading(bits);
        if first == ones(bits) {
            self.put(run, rank, class, old, first, None);
        } else {
            self.put(run, rank, class, old, 0, Some(bits));
        }
    }

    /// A rank gets the blocks `from..to` of a run.
    pub(super) fn hold(&mut self, run: u32, rank: u32, class: Class, from: u32, to: u32) {
        self.metas[run as usize].touched = self.clock;
        let old = self.cover(run, rank, class);
        match old {
            Cover::Full => {}
            Cover::None if from == 0 => self.put(run, rank, class, old, to, None),
            Cover::Part(_, Part { bitmap: false, value, .. }) if from <= value => {
                if to > value {
                    self.put(run, rank, class, old, to, None);
                }
            }
            _ => {
                let mut bits = self.cover_bits(run, old);
                mark(&mut bits, from, to, true);
                self.put_bits(run, rank, class, old, &bits);
            }
        }
    }

    /// A rank loses the blocks `from..to` of a run.
    pub(super) fn lose(&mut self, run: u32, rank: u32, class: Class, from: u32, to: u32) {
        let old = self.cover(run, rank, class);
        let end = match old {
            Cover::None => return,
            Cover::Full => Some(self.len(run)),
            Cover::Part(_, Part { bitmap, value, .. }) => (!bitmap).then_some(value),
        };
        match end {
            Some(end) if to >= end => {
                if from < end {
                    self.put(run, rank, class, old, from, None);
                }
            }
            _ => {
                let mut bits = self.cover_bits(run, old);
                mark(&mut bits, from, to, false);
                self.put_bits(run, rank, class, old, &bits);
            }
        }
        self.dying.push(run);
    }

    /// Whether a run is there only because a rank holds all of it.
    pub(super) fn is_all_of(&self, run: u32, rank: u32) -> bool {
        let Meta { kids, full, .. } = self.metas[run as usize];
        self.len(run) > 0
            && kids == 0
            && full == 1
            && self.word(run, 6) == 0
            && self.word(run, 7) == 0
            && self.in_full(run, rank)
    }

    /// A rank loses all that it has in a run, predictions included.
    pub(super) fn drop_all(&mut self, run: u32, rank: u32) {
        if self.len(run) == 0 {
            return;
        }
        let mut classes: Vec<Class> = self
            .shared
            .items(self.word(run, 6))
            .iter()
            .map(|i| Part::decode(i.load(Relaxed)))
            .filter(|part| part.rank == rank)
            .map(|part| part.class)
            .collect();
        if self.in_full(run, rank) {
            classes.push(Class::PRIMARY);
        }
        let len = self.len(run);
        for class in classes {
            self.lose(run, rank, class, 0, len.max(self.held_end(run)));
        }
        self.drop_predictions(run, rank);
    }

    /// Before a run is lengthened: who holds all of it will hold its beginning.
    pub(super) fn demote_full(&mut self, run: u32) {
        let len = self.len(run);
        for rank in self.full_ranks(run) {
            let part = Part { rank, class: Class::PRIMARY, bitmap: false, value: len };
            self.open(run);
            let kind = self.change_set(run, set_kind(self.word(run, 0)), rank, false);
            let parts = self.list_push(self.word(run, 6), &[part.encode()]);
            self.set_word(run, 6, parts);
            self.close(run, len, kind);
        }
    }

    /// After a run was cut: who holds all of it becomes a full holder.
    pub(super) fn promote_parts(&mut self, run: u32) {
        let len = self.len(run);
        for part in self.list_words(self.word(run, 6)).into_iter().map(Part::decode) {
            if part.class != Class::PRIMARY {
                continue;
            }
            let old = self.cover(run, part.rank, part.class);
            match part.bitmap {
                false if part.value == len => self.put(run, part.rank, part.class, old, len, None),
                false => {}
                true => {
                    let bits = self.cover_bits(run, old);
                    self.put_bits(run, part.rank, part.class, old, &bits);
                }
            }
        }
    }

    /// Divides one item of a run of `len` blocks that was split at `at`.
    pub(super) fn split_part(&mut self, run: u32, upper: u32, at: u32, len: u32, part: Part) {
        let Part { rank, class, bitmap, value } = part;
        let Some((index, _)) = self.find_part(run, rank, class) else { return };
        let old = Cover::Part(index, part);
        if !bitmap {
            if value >= at {
                self.put(run, rank, class, old, at, None);
            }
            if value > at {
                self.put(upper, rank, class, Cover::None, value - at, None);
            }
            return;
        }
        let words = self.shared.slab.get(value) as usize;
        let mut low = vec![0u64; at.div_ceil(64) as usize];
        let mut high = vec![0u64; (len - at).div_ceil(64) as usize];
        for block in (0..len.min(words as u32 * 64)).filter(|b| self.shared.bit(value, *b)) {
            if block < at {
                low[block as usize / 64] |= 1 << (block % 64);
            } else {
                high[(block - at) as usize / 64] |= 1 << ((block - at) % 64);
            }
        }
        self.put_bits(run, rank, class, old, &low);
        if high.iter().any(|w| *w != 0) {
            self.put_bits(upper, rank, class, Cover::None, &high);
        }
    }
}
