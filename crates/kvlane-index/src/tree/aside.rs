//! What the sets do not tell: predictions, lower tiers, and hybrid models.
//!
//! Most ranks need none of it for a given prompt. A prediction or a block of a lower tier counts only where the rank's device depth
//! ends, so a look at each item that lies on the path finds the ranks that it concerns; ranks of hybrid models are always concerned. For those
//! ranks all items are collected, and every figure is worked out from one question: which is the first block at or after this one
//! that the rank lacks?

use std::sync::atomic::Ordering::Relaxed;

use super::lookup::{Scratch, Step};
use super::shared::{Class, Part, Shared, decode_kind};
use crate::reference::window_blocks;
use crate::{GroupKind, Overlap, Tier};

#[derive(Debug)]
pub(super) struct Buffers {
    /// Ranks to be worked out, as bits.
    marked: Vec<u64>,
    /// Their items, sorted: rank, class, step, item.
    parts: Vec<(u32, Class, u32, Part)>,
    /// Their predictions, sorted: rank, step, blocks.
    predictions: Vec<(u32, u32, u32)>,
    kinds: Vec<(Class, GroupKind)>,
}

impl Buffers {
    pub(super) const NONE: Self =
        Self { marked: Vec::new(), parts: Vec::new(), predictions: Vec::new(), kinds: Vec::new() };
}

/// Rank and blocks of the predictions in a list.
fn predictions(tree: &Shared, list: u64) -> impl Iterator<Item = (u32, u32)> {
    tree.items(list).chunks_exact(2).map(|pair| {
        let word = pair[0].load(Relaxed);
        ((word >> 32) as u32, word as u32)
    })
}

impl Shared {
    /// Fills `others`, and corrects the groups for ranks of hybrid models.
    #[cold]
    pub(super) fn look_aside(&self, s: &mut Scratch) {
        self.spread_out(s);
        let Scratch { path, groups, device, aside, others, .. } = s;
        let Buffers { marked, parts, predictions: predicted, kinds } = aside;
        marked.clear();
        marked.resize(device.len().div_ceil(64), 0);
        let mut mark = |rank: u32| {
            if let Some(word) = marked.get_mut(rank as usize / 64) {
                *word |= 1 << (rank % 64);
            }
        };
        if self.directory.has_hybrid() {
            self.directory.iter().filter(|listed| listed.hybrid).for_each(|listed| mark(listed.index));
        }
        for step in path.iter() {
            // Number inside the step of the block at which the rank's device depth ends.
            let stops = |rank: u32| {
                let depth = device.get(rank as usize).copied()?;
                depth.checked_sub(step.depth).filter(|at| *at < step.matched)
            };
            for (rank, blocks) in predictions(self, step.predictions) {
                if stops(rank).is_some_and(|at| at < blocks) {
                    mark(rank);
                }
            }
            for item in self.items(step.parts) {
                let part = Part::decode(item.load(Relaxed));
                if part.class.tier() != Tier::Device
                    && stops(part.rank).is_some_and(|at| self.first_missing(part, at) > at)
                {
                    mark(part.rank);
                }
            }
        }
        if marked.iter().all(|word| *word == 0) {
            return;
        }
        let is_marked = |rank: u32| marked.get(rank as usize / 64).is_some_and(|w| w >> (rank % 64) & 1 == 1);
        parts.clear();
        predicted.clear();
        for (at, step) in (0u32..).zip(path.iter()) {
            for item in self.items(step.parts) {
                let part = Part::decode(item.load(Relaxed));
                if is_marked(part.rank) {
                    parts.push((part.rank, part.class, at, part));
                }
            }
            for (rank, blocks) in predictions(self, step.predictions) {
                if is_marked(rank) {
                    predicted.push((rank, at, blocks));
                }
            }
        }
        parts.sort_unstable_by_key(|(rank, class, at, _)| (*rank, *class, *at));
        predicted.sort_unstable();
        let (mut parts, mut predicted) = (&parts[..], &predicted[..]);
        for (at, word) in (0u32..).step_by(64).zip(marked.iter()) {
            let mut word = *word;
            while word != 0 {
                let rank = at + word.trailing_zeros();
                word &= word - 1;
                kinds.clear();
                let list = self.items(self.directory.kinds_of(rank));
                kinds.extend(list.iter().map(|kind| decode_kind(kind.load(Relaxed))));
                let (my_parts, rest) = parts.split_at(parts.partition_point(|(r, ..)| *r <= rank));
                parts = rest;
                let (my_predictions, rest) =
                    predicted.split_at(predicted.partition_point(|(r, ..)| *r <= rank));
                predicted = rest;
                let held =
                    Held { tree: self, path, rank, kinds, parts: my_parts, predictions: my_predictions };
                let on_device = device.get(rank as usize).copied().unwrap_or(0);
                let overlap = held.overlap(on_device);
                if overlap.device != on_device {
                    groups.drop_rank(rank);
                    groups.add_one(overlap.device, rank);
                }
                if overlap != Overlap::on_device(overlap.worker, overlap.device) {
                    others.push((rank, overlap));
                }
            }
        }
    }
}

/// What one rank holds along the path.
struct Held<'s> {
    tree: &'s Shared,
    path: &'s [Step],
    rank: u32,
    kinds: &'s [(Class, GroupKind)],
    parts: &'s [(u32, Class, u32, Part)],
    predictions: &'s [(u32, u32, u32)],
}

impl Held<'_> {
    /// Blocks of the prompt on the path.
    fn end(&self) -> u32 {
        self.path.last().map_or(0, Step::end)
    }

    /// The first block from `from` on up to which `reach` does not get: it says how far one gets in a step, from a block in it, both
    /// counted in the step.
    fn follow(&self, from: u32, reach: impl Fn(u32, &Step, u32) -> u32) -> u32 {
        let mut at = from;
        let first = self.path.partition_point(|step| step.end() <= from);
        for (number, step) in (first as u32..).zip(&self.path[first..]) {
            let reached = reach(number, step, at - step.depth).min(step.matched);
            at = at.max(step.depth + reached);
            if at < step.end() {
                break;
            }
        }
        at
    }

    /// The first block from `from` on that is not held in a class.
    fn missing(&self, class: Class, from: u32) -> u32 {
        self.follow(from, |number, step, at| {
            if class == Class::PRIMARY && self.tree.holds_all(step, self.rank) {
                return step.matched;
            }
            let found = self.parts.binary_search_by_key(&(class, number), |(_, class, at, _)| (*class, *at));
            found.map_or(at, |found| self.tree.first_missing(self.parts[found].3, at))
        })
    }

    /// The first block from `from` on that is not predicted.
    fn unforeseen(&self, from: u32) -> u32 {
        self.follow(from, |number, _, at| {
            let here = self.predictions.partition_point(|(_, step, _)| *step < number);
            let here = self.predictions[here..].iter().take_while(|(_, step, _)| *step == number);
            here.map(|(_, _, blocks)| *blocks).max().unwrap_or(0).max(at)
        })
    }

    fn missing_and_unforeseen(&self, class: Class, from: u32) -> u32 {
        further(from, |at| self.unforeseen(self.missing(class, at)))
    }

    fn groups(&self, tier: Tier) -> impl Iterator<Item = (Class, GroupKind)> {
        self.kinds.iter().copied().filter(move |(class, _)| class.tier() == tier)
    }

    /// The first block from `from` on that some full group of a tier lacks.
    fn missing_in(&self, tier: Tier, from: u32) -> u32 {
        let full = self.groups(tier).filter(|(_, kind)| *kind == GroupKind::Full);
        full.map(|(class, _)| self.missing(class, from)).min().unwrap_or(from)
    }

    /// The longest usable hit in the device tier, where `missing` says what a class lacks.
    fn hit(&self, missing: impl Fn(Class, u32) -> u32) -> u32 {
        let full = self.groups(Tier::Device).filter(|(_, kind)| *kind == GroupKind::Full);
        let mut hit = full.map(|(class, _)| missing(class, 0)).min().unwrap_or_else(|| self.end());
        'shorter: while hit > 0 {
            for (class, kind) in self.groups(Tier::Device) {
                // The last gap in the window ends every hit that needs it.
                let (mut at, mut gap) = (hit.saturating_sub(self.window(kind)), None);
                while at < hit {
                    let next = missing(class, at);
                    if next >= hit {
                        break;
                    }
                    (gap, at) = (Some(next), next + 1);
                }
                if let Some(gap) = gap {
                    hit = gap;
                    continue 'shorter;
                }
            }
            break;
        }
        hit
    }

    /// Blocks before the end of a hit that a group needs besides what full groups do.
    fn window(&self, kind: GroupKind) -> u32 {
        match kind {
            GroupKind::Full => 0,
            GroupKind::Sliding { window_tokens } => window_blocks(window_tokens, self.tree.block_tokens),
            GroupKind::Recurrent => 1,
        }
    }

    /// All figures; `depth` is the device depth if the device tier has but the primary class, with full attention.
    fn overlap(&self, depth: u32) -> Overlap {
        let plain = |(class, kind)| class == Class::PRIMARY && kind == GroupKind::Full;
        let (device, predicted) = if self.groups(Tier::Device).all(plain) {
            (depth, self.missing_and_unforeseen(Class::PRIMARY, depth))
        } else {
            let device = self.hit(|class, from| self.missing(class, from));
            (device, self.hit(|class, from| self.missing_and_unforeseen(class, from)))
        };
        let after_host = self.missing_in(Tier::Host, device);
        let after_disk = self.missing_in(Tier::Disk, after_host);
        let after_all = self.missing_in(Tier::External, after_disk);
        let only_full = self.groups(Tier::Device).all(|(_, kind)| kind == GroupKind::Full);
        let tiers = if only_full { &Tier::ALL[..] } else { &Tier::ALL[1..] };
        let mixed = further(device, |at| {
            tiers.iter().map(|tier| self.missing_in(*tier, at)).max().expect("there are tiers")
        });
        Overlap {
            worker: self.tree.directory.worker(self.rank),
            device,
            predicted,
            host: after_host - device,
            disk: after_disk - after_host,
            external: after_all - after_disk,
            mixed,
        }
    }
}

/// Goes on with `step` from where it got, until it gets no further.
fn further(from: u32, step: impl Fn(u32) -> u32) -> u32 {
    let mut at = from;
    loop {
        let next = step(at);
        if next <= at {
            return at;
        }
        at = next;
    }
}
