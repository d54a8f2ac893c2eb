//! Who holds the beginning of a prompt.
//!
//! First a walk: the runs that the prompt goes through, each found by the prefix hash after the one before and compared by its last
//! prefix hash alone. Then the ranks: those that hold everything so far are a set of bits; each run's set is intersected with it, and who
//! drops out is a *group* with the depth reached. So the cost is that of the runs, whatever the number of ranks. What does not fit
//! into sets (predictions, lower tiers, hybrid models) is worked out for the ranks that it concerns alone, in [`aside`](super::aside).
//!
//! # Consistency
//!
//! The walk reads without locks and checks at its end that no run on the path, and not the directory of ranks, has changed since it was first
//! read: then the answer was true at one moment. Otherwise it walks again, [`MAX_WALKS`] times at most; the last answer is cut
//! off before the first run that changed, which leaves what was true of the runs before it: an under-count, never more.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{Ordering::*, fence};

use super::prompt::{Lazy, Prompt, Ready};
use super::shared::{Class, NONE, PAGE, Part, SetKind, Shared, VERSION, length, set_kind};
use crate::overlaps::Groups;
use crate::{BlockHash, DepthGroups, Overlap, Overlaps};

/// Walks of one query along runs that keep changing.
const MAX_WALKS: usize = 4;

/// Ranks of a partition that are listed one by one, whoever holds something.
const FEW: usize = 32;

/// A run on the path of a prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    run: u32,
    word0: u64,
    /// Blocks of the prompt before the run.
    pub(super) depth: u32,
    /// Blocks of the run that the prompt goes through.
    pub(super) matched: u32,
    /// Words 4 to 7 of the header.
    set: [u64; 2],
    pub(super) parts: u64,
    pub(super) predictions: u64,
}

impl Step {
    /// One past its last block, in blocks of the prompt.
    pub(super) fn end(&self) -> u32 {
        self.depth + self.matched
    }
}

/// Buffers of a thread's queries.
#[derive(Debug)]
pub(super) struct Scratch {
    between: Vec<u64>,
    pub(super) path: Vec<Step>,
    active: Vec<u64>,
    pub(super) groups: Groups,
    /// Some run of the path has more than a set and beginnings of the primary class.
    pub(super) has_more: bool,
    /// By rank: its depth in `groups`, if they were spread out.
    pub(super) device: Vec<u32>,
    pub(super) aside: super::aside::Buffers,
    /// By rank: the overlaps that are more than a device depth.
    pub(super) others: Vec<(u32, Overlap)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            between: Vec::new(),
            path: Vec::new(),
            active: Vec::new(),
            groups: Groups::NONE,
            has_more: false,
            device: Vec::new(),
            aside: super::aside::Buffers::NONE,
            others: Vec::new(),
        })
    };
}

type Header = [u64; 8];

impl Shared {
    pub(crate) fn overlap(&self, blocks: &[BlockHash], out: &mut Overlaps) {
        self.answer(Lazy::new(&self.hasher, blocks), out, Self::list, |out| out.ranks.clear());
    }

    pub(crate) fn overlap_hashed(&self, prefixes: &[u64], out: &mut Overlaps) {
        self.answer(Ready(prefixes), out, Self::list, |out| out.ranks.clear());
    }

    pub(crate) fn depth_groups(self: &Arc<Self>, blocks: &[BlockHash], out: &mut DepthGroups) {
        let fill = |_: &Self, s: &mut Scratch, out: &mut DepthGroups| self.group(s, out);
        self.answer(Lazy::new(&self.hasher, blocks), out, fill, DepthGroups::clear);
    }

    pub(crate) fn depth_groups_hashed(self: &Arc<Self>, prefixes: &[u64], out: &mut DepthGroups) {
        let fill = |_: &Self, s: &mut Scratch, out: &mut DepthGroups| self.group(s, out);
        self.answer(Ready(prefixes), out, fill, DepthGroups::clear);
    }

    /// Finds who holds the beginning of a prompt, and has the answer written by `fill` or, if nobody does, by `clear`.
    #[inline]
    fn answer<P: Prompt + Buffered, T>(
        &self,
        mut prompt: P,
        out: &mut T,
        fill: impl Fn(&Self, &mut Scratch, &mut T),
        clear: impl Fn(&mut T),
    ) {
        // A prompt that nobody has seen ends here, after one look.
        let Some(first) = prompt.first().and_then(|prefix| self.run_at(prefix)) else { return clear(out) };
        SCRATCH.with_borrow_mut(|scratch| {
            prompt.swap(&mut scratch.between);
            if !self.find(&mut prompt, first, scratch, |s| fill(self, s, out)) {
                clear(out);
            }
            prompt.swap(&mut scratch.between);
        });
    }

    fn find(
        &self,
        prompt: &mut impl Prompt,
        first: (u32, Header),
        s: &mut Scratch,
        mut fill: impl FnMut(&mut Scratch),
    ) -> bool {
        let mut first = Some(first);
        for walk in 1..=MAX_WALKS {
            let version = self.directory.version();
            self.walk(prompt, first.take(), &mut s.path);
            if walk == MAX_WALKS {
                fence(Acquire);
                let sound = s.path.iter().take_while(|step| self.unchanged(step)).count();
                s.path.truncate(sound);
            }
            if s.path.is_empty() {
                return false;
            }
            self.follow(s);
            s.others.clear();
            if s.has_more || self.directory.has_hybrid() {
                self.look_aside(s);
            }
            fill(s);
            fence(Acquire);
            if version.is_multiple_of(2)
                && self.directory.version() == version
                && s.path.iter().all(|step| self.unchanged(step))
            {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn unchanged(&self, step: &Step) -> bool {
        let now = self.header(step.run).first().map_or(0, |word| word.load(Relaxed));
        now == step.word0 && now & VERSION == 0
    }

    /// The run that begins with a prefix, with the words of its header.
    #[inline(always)]
    fn run_at(&self, prefix: u64) -> Option<(u32, Header)> {
        let mut words = [0; 8];
        let run = self.table.find(prefix, |run| {
            let header: &[_; 8] = self.header(run).try_into().ok()?;
            words[0] = header[0].load(Acquire);
            for at in 1..8 {
                words[at] = header[at].load(Relaxed);
            }
            (words[1] == prefix && length(words[0]) > 0).then_some(run)
        })?;
        Some((run, words))
    }

    /// Blocks of a run that the prompt goes through, the first of which it does.
    #[inline]
    fn matched<P: Prompt>(&self, header: &Header, depth: usize, prompt: &mut P) -> u32 {
        let len = length(header[0]) as usize;
        let avail = len.min(prompt.len() - depth);
        let (mut low, mut high, mut stretch) = (1, avail, P::FIRST_LOOK);
        while low < avail {
            let end = avail.min(low.saturating_add(stretch));
            let stored = if end == len { header[2] } else { self.prefix_at(header[3], end as u32 - 1) };
            if prompt.prefix(depth + end) != stored {
                high = end - 1;
                break;
            }
            low = end;
            stretch = stretch.saturating_mul(2);
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

    /// Notes the runs that the prompt goes through.
    #[inline]
    fn walk(&self, prompt: &mut impl Prompt, first: Option<(u32, Header)>, path: &mut Vec<Step>) {
        path.clear();
        let mut depth = 0;
        let mut next = first.or_else(|| self.run_at(prompt.first()?));
        while let Some((run, header)) = next {
            let matched = self.matched(&header, depth, prompt);
            path.push(Step {
                run,
                word0: header[0],
                depth: depth as u32,
                matched,
                set: [header[4], header[5]],
                parts: header[6],
                predictions: header[7],
            });
            depth += matched as usize;
            if matched < length(header[0]) || depth >= prompt.len() {
                return;
            }
            next = self.run_at(prompt.prefix(depth + 1));
        }
    }

    /// Follows the holders of the primary class along the path, and groups them by the depth that they reach.
    #[inline]
    fn follow(&self, s: &mut Scratch) {
        let Scratch { path, active, groups, has_more, .. } = s;
        groups.clear();
        *has_more = path.iter().any(|step| step.predictions != 0);
        let end = path.last().map_or(0, Step::end);
        if path.iter().all(|step| set_kind(step.word0) == SetKind::INLINE) {
            // A fleet of up to 128 ranks: the sets are in the headers.
            let mut active = [0; 2];
            for (at, step) in path.iter().enumerate() {
                *has_more |= self.follow_parts(step, (at > 0).then_some(&mut active[..]), groups);
                if at == 0 {
                    active = step.set;
                    continue;
                }
                let left = [active[0] & !step.set[0], active[1] & !step.set[1]];
                active = [active[0] & step.set[0], active[1] & step.set[1]];
                groups.add_pair(step.depth, left);
            }
            groups.add_pair(end, active);
            return;
        }
        for (at, step) in path.iter().enumerate() {
            *has_more |= self.follow_parts(step, (at > 0).then_some(&mut active[..]), groups);
            if at == 0 {
                active.clear();
                self.set_words(step, |word| active.push(word));
            } else {
                self.intersect(step, active, groups);
            }
        }
        groups.add(end, active);
    }

    /// Groups those who hold a part of a run, if they got here (`None`: it is the first run); whether the run has other classes too.
    #[inline]
    fn follow_parts(&self, step: &Step, mut active: Option<&mut [u64]>, groups: &mut Groups) -> bool {
        let mut others = false;
        for item in self.items(step.parts) {
            let part = Part::decode(item.load(Relaxed));
            if part.class != Class::PRIMARY {
                others = true;
            } else if active.as_mut().is_none_or(|active| take_bit(active, part.rank)) {
                let depth = step.depth + self.first_missing(part, 0).min(step.matched);
                groups.add_one(depth, part.rank);
            }
        }
        others
    }

    /// Leaves in `active` who holds all of a run too; the others have got as far as its beginning.
    #[inline]
    fn intersect(&self, step: &Step, active: &mut [u64], groups: &mut Groups) {
        let left = groups.begin(active);
        if set_kind(step.word0) == SetKind::LIST {
            active.fill(0);
            for rank in ranks_of(step.set) {
                if take_bit(left, rank) {
                    active[rank as usize / 64] |= 1 << (rank % 64);
                }
            }
        } else {
            let (mut at, len) = (0, left.len());
            self.set_words(step, |word| {
                if at < len {
                    left[at] &= !word;
                    active[at] &= word;
                }
                at += 1;
            });
            active[at.min(len)..].fill(0);
        }
        groups.end(step.depth);
    }

    /// Calls `each` for the words of a run's set.
    #[inline]
    fn set_words(&self, step: &Step, mut each: impl FnMut(u64)) {
        let set = step.set;
        match set_kind(step.word0) {
            SetKind::INLINE => {
                each(set[0]);
                each(set[1]);
            }
            SetKind::LIST => {
                let top = ranks_of(set).max().map_or(0, |rank| rank / 64 + 1);
                for at in 0..top.min(super::shared::MAX_RANKS / 64) {
                    each(
                        ranks_of(set)
                            .filter(|r| r / 64 == at)
                            .map(|r| 1 << (r % 64))
                            .fold(0, |a: u64, b: u64| a | b),
                    );
                }
            }
            _ => {
                let words = self.slab.from((set[0] >> 32) as u32);
                for word in words.iter().take(set[0] as u32 as usize) {
                    each(word.load(Relaxed));
                }
            }
        }
    }

    /// Whether a rank holds all of a run in the primary class.
    pub(super) fn holds_all(&self, step: &Step, rank: u32) -> bool {
        self.set_has(set_kind(step.word0), step.set, rank)
    }

    /// First block at or after `from` that an item of a part list lacks.
    #[inline]
    pub(super) fn first_missing(&self, part: Part, from: u32) -> u32 {
        match part.bitmap {
            false => part.value.max(from),
            true => self.first_clear(part.value, from),
        }
    }

    /// Spreads the groups out by rank.
    pub(super) fn spread_out(&self, s: &mut Scratch) {
        s.device.clear();
        s.device.resize(self.directory.bits() as usize, 0);
        s.groups.spread(&mut s.device);
    }

    /// The overlap of each rank, in the order of the workers.
    fn list(&self, s: &mut Scratch, out: &mut Overlaps) {
        let ranks = &mut out.ranks;
        ranks.clear();
        let all = self.directory.len() as usize;
        let count = if all > FEW { s.groups.count() } else { 0 };
        if all > FEW && (count + s.others.len()) * 4 <= all {
            // Few of many: each by its number, then sorted.
            s.groups.each(|depth, rank| {
                if s.others.binary_search_by_key(&rank, |(rank, _)| *rank).is_err() {
                    ranks.push(Overlap::on_device(self.directory.worker(rank), depth));
                }
            });
            ranks.extend(s.others.iter().map(|(_, overlap)| *overlap));
            ranks.sort_unstable_by_key(|overlap| overlap.worker);
            return;
        }
        self.spread_out(s);
        let Scratch { device, others, .. } = s;
        let plain = self.directory.iter().map(|listed| {
            let depth = device.get(listed.index as usize).copied().unwrap_or(0);
            Overlap::on_device(listed.worker, depth)
        });
        if others.is_empty() {
            ranks.extend(plain);
            if count < all {
                ranks.retain(|overlap| overlap.device > 0);
            }
            return;
        }
        others.sort_unstable_by_key(|(_, overlap)| overlap.worker);
        let mut others = others.iter().map(|(_, overlap)| *overlap).peekable();
        for plain in plain {
            match others.next_if(|other| other.worker == plain.worker) {
                Some(other) => ranks.push(other),
                None if plain.device > 0 => ranks.push(plain),
                None => {}
            }
        }
    }

    /// The groups as they are, with the names of their members.
    fn group(self: &Arc<Self>, s: &mut Scratch, out: &mut DepthGroups) {
        std::mem::swap(&mut s.groups, &mut out.groups);
        out.groups.arrange();
        out.others.clear();
        out.others.extend(s.others.iter().map(|(_, overlap)| *overlap));
        out.others.sort_unstable_by_key(|overlap| overlap.worker);
        out.names.renew(self, self.directory.version(), self.directory.workers());
    }
}

/// A prompt that may want a buffer for its prefix hashes.
trait Buffered {
    fn swap(&mut self, _buffer: &mut Vec<u64>) {}
}

impl Buffered for Ready<'_> {}

impl Buffered for Lazy<'_> {
    fn swap(&mut self, buffer: &mut Vec<u64>) {
        std::mem::swap(&mut self.between, buffer);
        self.between.clear();
    }
}

/// The ranks of a set of kind `LIST`.
fn ranks_of(set: [u64; 2]) -> impl Iterator<Item = u32> {
    let ranks = [set[0] as u32, (set[0] >> 32) as u32, set[1] as u32, (set[1] >> 32) as u32];
    ranks.into_iter().filter(|rank| *rank != NONE)
}

/// Clears a bit; whether it was set.
#[inline]
pub(super) fn take_bit(bits: &mut [u64], at: u32) -> bool {
    bits.get_mut(at as usize / 64).is_some_and(|word| {
        let was = *word >> (at % 64) & 1 == 1;
        *word &= !(1 << (at % 64));
        was
    })
}

const _: () = assert!(PAGE == 16, "a page list item names a page of 16 blocks");
