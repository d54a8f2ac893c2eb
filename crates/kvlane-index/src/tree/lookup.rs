//! Who holds the beginning of a prompt.
//!
//! One walk along the runs that the prompt goes through. The ranks that hold everything so far are a set of bits; each run's set
//! is intersected with it, and a rank that drops out gets the depth reached. Ranks that go on by a prediction are carried beside
//! it. Ranks that hold more than one class are worked out afterwards, class by class, from the same runs.
//!
//! # Consistency
//!
//! The walk reads without locks and checks at its end that no run on the path, and not the directory of ranks, has changed since it was first
//! read: then the answer was true at one moment. Otherwise it walks again, [`MAX_WALKS`] times at most; the last answer is cut
//! off before the first run that changed, which leaves what was true of the runs before it: an under-count, never more.

use std::cell::RefCell;
use std::sync::atomic::{Ordering::*, fence};

use super::shared::{Class, Listed, PAGE, Part, SetKind, Shared, VERSION, decode_kind, length, set_kind};
use crate::prefix::PrefixHasher;
use crate::reference::window_blocks;
use crate::{BlockHash, GroupKind, Overlap, Overlaps, Tier};

/// Walks of one query along runs that keep changing.
const MAX_WALKS: usize = 4;
/// Blocks hashed before a look whether the prompt still follows the run.
const STRETCH: usize = 256;

/// A run on the path of a prompt.
#[derive(Clone, Copy, Debug)]
struct Step {
    run: u32,
    word0: u64,
    /// Blocks of the prompt before the run.
    depth: u32,
    /// Blocks of the run that the prompt goes through.
    matched: u32,
}

/// A rank and a depth.
#[derive(Clone, Copy, Debug)]
struct Reached {
    rank: u32,
    depth: u32,
}

#[derive(Debug, Default)]
struct Scratch {
    prefixes: Vec<u64>,
    path: Vec<Step>,
    active: Vec<u64>,
    /// By rank: the depth at which it left the device set.
    device: Vec<u32>,
    /// Ranks that go on by predictions.
    carried: Vec<u32>,
    next_carried: Vec<u32>,
    predicted: Vec<Reached>,
    /// By rank: the larger of the device depth and the depth reached by predictions; empty if there are none.
    depths: Vec<u32>,
    parts: Vec<(u32, u32, Part)>,
    classes: Vec<(Class, GroupKind, Vec<u64>)>,
}

impl Scratch {
    /// The overlap of a rank that holds nothing but group 0 of the device tier.
    #[inline]
    fn plain(&self, listed: Listed) -> Overlap {
        let Listed { worker, index, .. } = listed;
        let device = self.device.get(index as usize).copied().unwrap_or(0);
        let predicted = self.depths.get(index as usize).copied().unwrap_or(device);
        Overlap { worker, device, predicted, host: 0, disk: 0, external: 0, mixed: device }
    }
}

/// Notes how far a rank got.
#[inline]
fn reach(depths: &mut [u32], rank: u32, depth: u32) {
    if let Some(reached) = depths.get_mut(rank as usize) {
        *reached = depth;
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The prefix hashes of a prompt, made when they are needed or ready.
trait Prompt {
    /// Blocks of the prompt.
    fn len(&self) -> usize;
    /// Prefix hash of the first `blocks` blocks, at least 1.
    fn prefix(&mut self, blocks: usize) -> u64;
}

/// Hashes a prompt as far as it is followed: sums of stretches, and each prefix only of the stretch in which it leaves a run.
struct Lazy<'a> {
    hasher: &'a PrefixHasher,
    blocks: &'a [BlockHash],
    /// The last two numbers of blocks asked for, with their prefix hashes.
    before: (usize, u64),
    known: (usize, u64),
    /// Every prefix hash after `before` up to `known`, if they were asked for.
    between: Vec<u64>,
}

impl<'a> Lazy<'a> {
    fn new(hasher: &'a PrefixHasher, blocks: &'a [BlockHash], mut between: Vec<u64>) -> Self {
        between.clear();
        let root = (0, hasher.root());
        Self { hasher, blocks, before: root, known: root, between }
    }
}

impl Prompt for Lazy<'_> {
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

struct Ready<'a>(&'a [u64]);

impl Prompt for Ready<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn prefix(&mut self, blocks: usize) -> u64 {
        self.0[blocks - 1]
    }
}

impl Shared {
    pub(crate) fn overlap(&self, blocks: &[BlockHash], out: &mut Overlaps) {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut prompt = Lazy::new(&self.hasher, blocks, std::mem::take(&mut scratch.prefixes));
            self.overlap_with(&mut prompt, out, scratch);
            scratch.prefixes = prompt.between;
        });
    }

    pub(crate) fn overlap_hashed(&self, prefixes: &[u64], out: &mut Overlaps) {
        SCRATCH.with_borrow_mut(|scratch| self.overlap_with(&mut Ready(prefixes), out, scratch));
    }

    fn overlap_with(&self, prompt: &mut impl Prompt, out: &mut Overlaps, s: &mut Scratch) {
        if prompt.len() == 0 {
            return out.ranks.clear();
        }
        for walk in 1..=MAX_WALKS {
            let version = self.directory.version();
            self.walk(prompt, s);
            let mut limit = u32::MAX;
            if walk == MAX_WALKS {
                fence(Acquire);
                limit = s.path.iter().find(|step| !self.unchanged(step)).map_or(u32::MAX, |step| step.depth);
            }
            self.collect(s, limit, out);
            fence(Acquire);
            if version.is_multiple_of(2) && self.directory.version() == version {
                let sound = |step: &Step| step.depth >= limit || self.unchanged(step);
                if s.path.iter().all(sound) {
                    return;
                }
            }
            std::hint::spin_loop();
        }
        out.ranks.clear();
    }

    fn unchanged(&self, step: &Step) -> bool {
        let now = self.header(step.run).first().map_or(0, |word| word.load(Relaxed));
        now == step.word0 && now & VERSION == 0
    }

    /// The run that begins with a prefix, with the words of its header.
    #[inline]
    fn run_at(&self, prefix: u64) -> Option<(u32, [u64; 8])> {
        self.table.find(prefix, |run| {
            let header = self.header(run);
            let mut words = [header.first()?.load(Acquire), 0, 0, 0, 0, 0, 0, 0];
            for (word, slot) in words[1..].iter_mut().zip(&header[1..]) {
                *word = slot.load(Relaxed);
            }
            (words[1] == prefix && length(words[0]) > 0).then_some((run, words))
        })
    }

    /// Blocks of a run that the prompt goes through, the first of which it does.
    #[inline]
    fn matched(&self, header: &[u64; 8], depth: usize, prompt: &mut impl Prompt) -> u32 {
        let len = length(header[0]) as usize;
        let avail = len.min(prompt.len() - depth);
        let (mut low, mut high) = (1, avail);
        // Hash and compare in stretches, so that a prompt that leaves a long run early is not hashed to its end.
        while low < avail {
            let end = avail.min(low + STRETCH);
            let stored = if end == len { header[2] } else { self.prefix_at(header[3], end as u32 - 1) };
            if prompt.prefix(depth + end) != stored {
                high = end - 1;
                break;
            }
            low = end;
        }
        // The prompt follows the first `low` blocks; find where it leaves within `high`.
        while low < high {
            let middle = (low + high).div_ceil(2);
            if prompt.prefix(depth + middle) == self.prefix_at(header[3], middle as u32 - 1) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low as u32
    }

    fn walk(&self, prompt: &mut impl Prompt, s: &mut Scratch) {
        s.path.clear();
        s.active.clear();
        s.carried.clear();
        s.predicted.clear();
        let all_the_way = self.directory.has_complex();
        let mut depth = 0;
        while depth < prompt.len() {
            let Some((run, header)) = self.run_at(prompt.prefix(depth + 1)) else { break };
            let matched = self.matched(&header, depth, prompt);
            let step = Step { run, word0: header[0], depth: depth as u32, matched };
            if s.path.is_empty() {
                s.device.clear();
                s.device.resize(self.directory.bits() as usize, 0);
            }
            s.path.push(step);
            if header[7] != 0 || !s.carried.is_empty() {
                self.carry(&header, step, s);
            }
            self.intersect(&header, step, s);
            depth += matched as usize;
            if matched < length(header[0]) {
                break;
            }
            if s.carried.is_empty() && !all_the_way && s.active.iter().all(|word| *word == 0) {
                break;
            }
        }
        let depth = depth as u32;
        let Scratch { active, device, .. } = s;
        each_bit(active, |rank| reach(device, rank, depth));
        s.predicted.extend(s.carried.drain(..).map(|rank| Reached { rank, depth }));
    }

    /// Leaves in `active` the ranks that hold all that the prompt shares with this run.
    #[inline]
    fn intersect(&self, header: &[u64; 8], step: Step, s: &mut Scratch) {
        let first = step.depth == 0;
        for item in self.items(header[6]) {
            let part = Part::decode(item.load(Relaxed));
            if part.class != Class::PRIMARY || !(first || take_bit(&mut s.active, part.rank)) {
                continue;
            }
            let blocks = self.first_missing(part, 0).min(step.matched);
            if blocks > 0 || !first {
                reach(&mut s.device, part.rank, step.depth + blocks);
            }
        }
        let (kind, set) = (set_kind(header[0]), [header[4], header[5]]);
        let depth = step.depth;
        let Scratch { active, device, .. } = s;
        let mut at = 0;
        let mut meet = |word: u64| {
            if first {
                active.push(word);
            } else if let Some(old) = active.get_mut(at) {
                let left = *old & !word;
                *old &= word;
                each_bit_of(left, at, |rank| reach(device, rank, depth));
            }
            at += 1;
        };
        match kind {
            SetKind::INLINE => {
                meet(set[0]);
                meet(set[1]);
            }
            SetKind::LIST => {
                let ranks = [set[0] as u32, (set[0] >> 32) as u32, set[1] as u32, (set[1] >> 32) as u32];
                let top = ranks.iter().filter(|r| **r != u32::MAX).max().map_or(0, |r| r / 64 + 1);
                for i in 0..top.min(super::shared::MAX_RANKS / 64) {
                    let bit = |r: &u32| if r / 64 == i { 1u64 << (r % 64) } else { 0 };
                    meet(ranks.iter().map(bit).fold(0, |a, b| a | b));
                }
            }
            _ => {
                let words = self.slab.from((set[0] >> 32) as u32);
                for word in words.iter().take(set[0] as u32 as usize) {
                    meet(word.load(Relaxed));
                }
            }
        }
        while !first && at < active.len() {
            let left = std::mem::take(&mut active[at]);
            each_bit_of(left, at, |rank| reach(device, rank, depth));
            at += 1;
        }
    }

    /// First block at or after `from` that an item of a part list lacks.
    fn first_missing(&self, part: Part, from: u32) -> u32 {
        match part.bitmap {
            false => part.value.max(from),
            true => self.first_clear(part.value, from),
        }
    }

    /// Follows the ranks that go on by predictions through a run. Called before [`intersect`](Self::intersect).
    fn carry(&self, header: &[u64; 8], step: Step, s: &mut Scratch) {
        let (kind, set) = (set_kind(header[0]), [header[4], header[5]]);
        let matched = step.matched;
        // How far a rank gets that is predicted to hold the first `blocks`.
        let reach = |rank: u32, blocks: u32| {
            if self.set_has(kind, set, rank) {
                return matched;
            }
            let parts = self.items(header[6]).iter().map(|item| Part::decode(item.load(Relaxed)));
            let part = parts.into_iter().find(|p| p.rank == rank && p.class == Class::PRIMARY);
            part.map_or(blocks, |part| self.first_missing(part, blocks)).min(matched)
        };
        s.next_carried.clear();
        let mut go_on = |rank: u32, blocks: u32, predicted: &mut Vec<Reached>| {
            let reached = reach(rank, blocks);
            if reached == matched {
                // Whom the device tier carries needs no prediction.
                let on_device = step.depth == 0 || has_bit(&s.active, rank);
                if !(on_device && self.set_has(kind, set, rank)) {
                    s.next_carried.push(rank);
                }
            } else if reached > 0 || step.depth > 0 {
                predicted.push(Reached { rank, depth: step.depth + reached });
            }
        };
        let items = self.items(header[7]);
        for (at, pair) in items.chunks_exact(2).enumerate() {
            let word = pair[0].load(Relaxed);
            let rank = (word >> 32) as u32;
            let same = |pair: &[std::sync::atomic::AtomicU64]| (pair[0].load(Relaxed) >> 32) as u32 == rank;
            if items[..2 * at].chunks_exact(2).any(same) {
                continue;
            }
            let so_far = step.depth == 0 || s.carried.contains(&rank) || has_bit(&s.active, rank);
            if so_far {
                let all = items[2 * at..].chunks_exact(2).filter(|p| same(p));
                let blocks = all.map(|p| p[0].load(Relaxed) as u32).max().unwrap_or(0);
                go_on(rank, blocks, &mut s.predicted);
            }
        }
        for at in 0..s.carried.len() {
            let rank = s.carried[at];
            let listed = items.iter().step_by(2).any(|item| (item.load(Relaxed) >> 32) as u32 == rank);
            if !listed {
                go_on(rank, 0, &mut s.predicted);
            }
        }
        std::mem::swap(&mut s.carried, &mut s.next_carried);
    }

    /// Puts what the walk found into the order of the workers. Nothing from block `limit` on counts.
    fn collect(&self, s: &mut Scratch, limit: u32, out: &mut Overlaps) {
        out.ranks.clear();
        if s.path.is_empty() {
            return;
        }
        if limit < u32::MAX {
            s.device.iter_mut().for_each(|depth| *depth = (*depth).min(limit));
        }
        s.depths.clear();
        if !s.predicted.is_empty() {
            s.depths.extend_from_slice(&s.device);
            for &Reached { rank, depth } in &s.predicted {
                if let Some(reached) = s.depths.get_mut(rank as usize) {
                    *reached = (*reached).max(depth.min(limit));
                }
            }
        }
        if self.directory.has_complex() {
            self.gather(s, limit);
            for listed in self.directory.iter() {
                let overlap = match listed.complex {
                    true => self.complex(listed.worker, listed.index, s, limit),
                    false => s.plain(listed),
                };
                if overlap.device + overlap.predicted + overlap.host + overlap.disk + overlap.external > 0 {
                    out.ranks.push(overlap);
                }
            }
            return;
        }
        // Mostly either few ranks hold something or (a prompt that all have seen) nearly all.
        let found = if s.depths.is_empty() { &s.device } else { &s.depths };
        let (count, ranks) =
            (found.iter().filter(|depth| **depth > 0).count(), self.directory.len() as usize);
        if count * 2 > ranks {
            out.ranks.extend(self.directory.iter().map(|listed| s.plain(listed)));
            if count < ranks {
                out.ranks.retain(|overlap| overlap.predicted > 0);
            }
        } else {
            out.ranks.extend(self.directory.iter().map(|listed| s.plain(listed)).filter(|o| o.predicted > 0));
        }
    }

    /// Collects the part lists and predictions of the path, by rank.
    fn gather(&self, s: &mut Scratch, limit: u32) {
        s.parts.clear();
        for (at, step) in (0u32..).zip(&s.path).take_while(|(_, step)| step.depth < limit) {
            let header = self.header(step.run);
            if header.is_empty() {
                continue;
            }
            for item in self.items(header[6].load(Relaxed)) {
                let part = Part::decode(item.load(Relaxed));
                s.parts.push((part.rank, at, part));
            }
        }
        s.parts.sort_unstable_by_key(|(rank, at, _)| (*rank, *at));
    }

    /// The overlap of a rank that holds more than one class, from all that the path says about it.
    fn complex(&self, worker: crate::Worker, rank: u32, s: &mut Scratch, limit: u32) -> Overlap {
        let Scratch { path, parts, classes, .. } = s;
        let steps = || path.iter().take_while(|step| step.depth < limit);
        let end = steps().last().map_or(0, |step| (step.depth + step.matched).min(limit));
        let words = end.div_ceil(64) as usize;
        let kinds = self.items(self.directory.kinds_of(rank));
        classes.truncate(kinds.len());
        for (at, kind) in kinds.iter().enumerate() {
            let (class, kind) = decode_kind(kind.load(Relaxed));
            if classes.len() == at {
                classes.push((class, kind, Vec::new()));
            }
            let slot = &mut classes[at];
            (slot.0, slot.1) = (class, kind);
            slot.2.clear();
            slot.2.resize(words, 0);
        }
        let mut predicted = vec![0u64; words];
        for step in steps() {
            let header = self.header(step.run);
            let [kind, a, b, list] =
                [0, 4, 5, 7].map(|i: usize| header.get(i).map_or(0, |w| w.load(Relaxed)));
            if self.set_has(set_kind(kind), [a, b], rank)
                && let Some((_, _, bits)) = classes.iter_mut().find(|(class, ..)| *class == Class::PRIMARY)
            {
                mark(bits, step.depth, step.depth + step.matched);
            }
            let mine = self.items(list).chunks_exact(2).map(|pair| pair[0].load(Relaxed));
            let blocks = mine.filter(|w| (w >> 32) as u32 == rank).map(|w| w as u32).max().unwrap_or(0);
            mark(&mut predicted, step.depth, step.depth + blocks.min(step.matched));
        }
        let from = parts.partition_point(|(r, ..)| *r < rank);
        for (_, at, part) in parts[from..].iter().take_while(|(r, ..)| *r == rank) {
            let Some(step) = path.get(*at as usize) else { continue };
            let Some((_, _, bits)) = classes.iter_mut().find(|(class, ..)| *class == part.class) else {
                continue;
            };
            if part.bitmap {
                for block in (0..step.matched).filter(|block| self.bit(part.value, *block)) {
                    mark(bits, step.depth + block, step.depth + block + 1);
                }
            } else {
                mark(bits, step.depth, step.depth + part.value.min(step.matched));
            }
        }
        self.count(worker, end, classes, &predicted)
    }

    /// The figures of one rank, from what each of its classes holds of the first `end` blocks.
    fn count(
        &self,
        worker: crate::Worker,
        end: u32,
        classes: &[(Class, GroupKind, Vec<u64>)],
        predicted_bits: &[u64],
    ) -> Overlap {
        let device = self.hit(end, classes, None);
        let predicted = self.hit(end, classes, Some(predicted_bits));
        let full_in = |tier: Tier| {
            classes.iter().filter(move |(class, kind, _)| class.tier() == tier && *kind == GroupKind::Full)
        };
        let in_tier = |tier: Tier, at: u32| {
            full_in(tier).next().is_some() && full_in(tier).all(|(_, _, bits)| has_bit(bits, at))
        };
        let run = |from: u32, tier: Tier| (from..end).take_while(|&at| in_tier(tier, at)).count() as u32;
        let host = run(device, Tier::Host);
        let disk = run(device + host, Tier::Disk);
        let external = run(device + host + disk, Tier::External);
        let only_full =
            classes.iter().all(|(c, kind, _)| c.tier() != Tier::Device || *kind == GroupKind::Full);
        let anywhere = |at: u32| {
            [Tier::Host, Tier::Disk, Tier::External].into_iter().any(|tier| in_tier(tier, at))
                || only_full && in_tier(Tier::Device, at)
        };
        let mixed = device + (device..end).take_while(|&at| anywhere(at)).count() as u32;
        Overlap { worker, device, predicted, host, disk, external, mixed }
    }

    /// The longest usable hit in the device tier.
    fn hit(&self, end: u32, classes: &[(Class, GroupKind, Vec<u64>)], predicted: Option<&[u64]>) -> u32 {
        let groups = || classes.iter().filter(|(class, ..)| class.tier() == Tier::Device);
        let assumed = |at: u32| predicted.is_some_and(|bits| has_bit(bits, at));
        if groups().next().is_none() {
            return (0..end).take_while(|&at| assumed(at)).count() as u32;
        }
        let held = |bits: &[u64], at: u32| has_bit(bits, at) || assumed(at);
        let full = groups().filter(|(_, kind, _)| *kind == GroupKind::Full);
        let longest = full
            .map(|(_, _, bits)| (0..end).take_while(|&at| held(bits, at)).count() as u32)
            .min()
            .unwrap_or(end);
        let window = |kind: GroupKind| match kind {
            GroupKind::Full => 0,
            GroupKind::Sliding { window_tokens } => window_blocks(window_tokens, self.block_tokens),
            GroupKind::Recurrent => 1,
        };
        let mut p = longest;
        'shorter: while p > 0 {
            for (_, kind, bits) in groups() {
                let from = p.saturating_sub(window(*kind));
                // The last gap in the window ends every hit that needs it.
                if let Some(gap) = (from..p).rev().find(|&at| !held(bits, at)) {
                    p = gap;
                    continue 'shorter;
                }
            }
            break;
        }
        p
    }
}

fn mark(bits: &mut [u64], from: u32, to: u32) {
    let mut at = from;
    while at < to {
        let here = (64 - at % 64).min(to - at);
        if let Some(word) = bits.get_mut(at as usize / 64) {
            *word |= (u64::MAX >> (64 - here)) << (at % 64);
        }
        at += here;
    }
}

#[inline]
fn has_bit(bits: &[u64], at: u32) -> bool {
    bits.get(at as usize / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
}

/// Clears a bit; whether it was set.
#[inline]
fn take_bit(bits: &mut [u64], at: u32) -> bool {
    bits.get_mut(at as usize / 64).is_some_and(|word| {
        let was = *word >> (at % 64) & 1 == 1;
        *word &= !(1 << (at % 64));
        was
    })
}

fn each_bit(bits: &[u64], mut each: impl FnMut(u32)) {
    for (at, word) in bits.iter().enumerate() {
        each_bit_of(*word, at, &mut each);
    }
}

/// Calls `each` for the bits of the `at`-th word of a set.
#[inline]
fn each_bit_of(mut word: u64, at: usize, mut each: impl FnMut(u32)) {
    while word != 0 {
        each(at as u32 * 64 + word.trailing_zeros());
        word &= word - 1;
    }
}

const _: () = assert!(PAGE == 16, "a page list item names a page of 16 blocks");
