//! Blocks enter a tier.
//!
//! The common case (a rank with nothing but main names, blocks that are new or bear the name that the event gives them) goes by
//! whole stretches of runs. Everything else goes block by block through [`Tree::store_one`], which spells out the semantics of
//! [`reference`](crate::reference).

use super::Tree;
use super::names::spread;
use super::orphans::Fate;
use super::ranks::Twin;
use super::runs::{Meta, NAMELESS, Segment};
use super::shared::{Class, MAX_RUN, NONE, PAGE, length, set_kind};
use crate::reference::MAX_COPIES;
use crate::{Applied, BlockHash, EngineHash, StoredBlock};

/// Blocks of an event from which on their contents are gathered, to be hashed several at a time.
const WIDE: usize = 16;

/// What a rank knows about a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    No,
    /// Held at this block.
    At(u32),
    /// Held, but its place is not known.
    Orphan,
}

impl Tree {
    // ---- names of a rank -----------------------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn main_block(&self, name: u64) -> Option<u32> {
        if name == NAMELESS {
            return None;
        }
        self.names.find(spread(name), |block| self.engines.get(block) == name)
    }

    pub(super) fn is_main(&self, block: u32, name: u64) -> bool {
        name != NAMELESS && self.engines.get(block) == name
    }

    pub(super) fn holds_block(&self, rank: u32, block: u32) -> bool {
        let (run, at) = self.locate(block);
        self.rank(rank).classes.iter().any(|c| self.holds(run, at, rank, c.class))
    }

    /// Where a rank holds a name.
    pub(super) fn known(&self, rank: u32, name: u64) -> Known {
        let state = self.rank(rank);
        if !state.aliases.is_empty()
            && let Some(&block) = state.aliases.get(&name)
        {
            return Known::At(block);
        }
        if !state.orphans.is_empty() && state.orphans.holds(name) {
            return Known::Orphan;
        }
        let Some(block) = self.main_block(name) else { return Known::No };
        if let Some(twins) = state.twins.get(&block) {
            return if twins.iter().any(|t| t.name == name) { Known::At(block) } else { Known::No };
        }
        if (state.aliased.is_empty() || !state.is_aliased(block)) && self.holds_block(rank, block) {
            Known::At(block)
        } else {
            Known::No
        }
    }

    // ---- copies and twins ----------------------------------------------------------------------------------------------------------

    /// Adds `copies` of a name at a block in a class; how many of them are new.
    pub(super) fn grant(&mut self, rank: u32, class: Class, name: u64, block: u32, copies: u8) -> u8 {
        let (run, at) = self.locate(block);
        if let Some(twins) = self.rank_mut(rank).twins.get_mut(&block) {
            let twin = match twins.iter().position(|t| t.name == name) {
                Some(i) => &mut twins[i],
                None => {
                    twins.push(Twin { name, copies: Vec::new() });
                    twins.last_mut().expect("pushed a moment ago")
                }
            };
            let had = add_copies(&mut twin.copies, class, copies);
            if !self.is_main(block, name) {
                self.rank_mut(rank).aliases.insert(name, block);
            }
            self.count_name(rank, class, had, true);
            self.hold(run, rank, class, at, at + 1);
            return had;
        }
        if !self.holds_block(rank, block) {
            // The first name of the rank here.
            if !self.is_main(block, name) && !self.give_main_name(block, EngineHash(name)) {
                let state = self.rank_mut(rank);
                state.aliases.insert(name, block);
                state.set_aliased(block, true);
            }
            self.hold(run, rank, class, at, at + 1);
            self.set_copies(rank, class, block, copies);
            self.count_name(rank, class, 0, true);
            return 0;
        }
        if self.only_name(rank, block) == name {
            let had = self.copies(rank, class, run, at, block);
            self.set_copies(rank, class, block, had.saturating_add(copies).min(MAX_COPIES));
            self.count_name(rank, class, had, true);
            self.hold(run, rank, class, at, at + 1);
            return had;
        }
        self.make_twins(rank, block);
        self.grant(rank, class, name, block, copies)
    }

    fn count_name(&mut self, rank: u32, class: Class, had: u8, up: bool) {
        if had == 0 {
            let names = &mut self.rank_mut(rank).shown(class).names;
            *names = if up { *names + 1 } else { *names - 1 };
        }
    }

    /// The one name under which a rank holds a block.
    pub(super) fn only_name(&self, rank: u32, block: u32) -> u64 {
        let state = self.rank(rank);
        if !state.is_aliased(block) {
            return self.engines.get(block);
        }
        // Rare: a second name for a block that has an alias already.
        let (name, _) =
            state.aliases.iter().find(|(_, b)| **b == block).expect("an aliased block has an alias");
        *name
    }

    /// Copies of the one name that a rank has for a block.
    pub(super) fn copies(&self, rank: u32, class: Class, run: u32, at: u32, block: u32) -> u8 {
        if !self.holds(run, at, rank, class) {
            return 0;
        }
        let more = &self.rank(rank).copies;
        if more.is_empty() { 1 } else { 1 + more.get(&(class.0, block)).copied().unwrap_or(0) }
    }

    fn set_copies(&mut self, rank: u32, class: Class, block: u32, copies: u8) {
        let more = &mut self.rank_mut(rank).copies;
        if copies > 1 {
            more.insert((class.0, block), copies - 1);
        } else if !more.is_empty() {
            more.remove(&(class.0, block));
        }
    }

    /// Writes out what a rank holds at a block under its one name, before a second name joins.
    fn make_twins(&mut self, rank: u32, block: u32) {
        let name = self.only_name(rank, block);
        let (run, at) = self.locate(block);
        let classes: Vec<Class> = self.rank(rank).classes.iter().map(|c| c.class).collect();
        let mut copies = Vec::new();
        for class in classes {
            let n = self.copies(rank, class, run, at, block);
            if n > 0 {
                copies.push((class, n));
                self.set_copies(rank, class, block, 0);
            }
        }
        let state = self.rank_mut(rank);
        state.set_aliased(block, false);
        state.twins.insert(block, vec![Twin { name, copies }]);
    }

    /// Goes back from twins to one name or none; what the rank holds of the block is set to what its names hold.
    pub(super) fn settle_twins(&mut self, rank: u32, block: u32) {
        let mut twins = self.rank_mut(rank).twins.remove(&block).expect("the caller saw them");
        twins.retain(|t| !t.copies.is_empty());
        let (run, at) = self.locate(block);
        let classes: Vec<Class> = self.rank(rank).classes.iter().map(|c| c.class).collect();
        for class in classes {
            if !twins.iter().any(|t| t.copies.iter().any(|(c, _)| *c == class)) {
                self.lose(run, rank, class, at, at + 1);
            }
        }
        match twins.as_slice() {
            [] => {}
            [Twin { name, copies }] => {
                let is_alias = !self.is_main(block, *name);
                self.rank_mut(rank).set_aliased(block, is_alias);
                for (class, n) in copies {
                    self.set_copies(rank, *class, block, *n);
                }
            }
            _ => {
                self.rank_mut(rank).twins.insert(block, twins);
            }
        }
    }

    /// A rank forgets a name and all that it holds under it.
    pub(super) fn forget(&mut self, rank: u32, name: u64, block: u32) {
        let (run, at) = self.locate(block);
        self.rank_mut(rank).aliases.remove(&name);
        if let Some(twins) = self.rank_mut(rank).twins.get_mut(&block) {
            let at = twins.iter().position(|t| t.name == name).expect("the caller found the name here");
            for (class, _) in twins.swap_remove(at).copies {
                self.count_name(rank, class, 0, false);
            }
            self.settle_twins(rank, block);
            return;
        }
        self.rank_mut(rank).set_aliased(block, false);
        let classes: Vec<Class> = self.rank(rank).classes.iter().map(|c| c.class).collect();
        for class in classes {
            if self.holds(run, at, rank, class) {
                self.set_copies(rank, class, block, 0);
                self.count_name(rank, class, 0, false);
                self.lose(run, rank, class, at, at + 1);
            }
        }
    }

    /// A rank forgets all copies, under any name, that it has of a held block in one class; how many names that were.
    pub(super) fn forget_class(&mut self, rank: u32, class: Class, block: u32) -> u32 {
        let names: Vec<(u64, u8)> = match self.rank(rank).twins.get(&block) {
            Some(twins) => {
                let copies = |t: &Twin| t.copies.iter().find(|(c, _)| *c == class).map(|(_, n)| (t.name, *n));
                twins.iter().filter_map(copies).collect()
            }
            None => {
                let (run, at) = self.locate(block);
                vec![(self.only_name(rank, block), self.copies(rank, class, run, at, block))]
            }
        };
        for &(name, copies) in &names {
            for _ in 0..copies {
                self.revoke(rank, class, name, block);
            }
        }
        names.len() as u32
    }

    /// One copy of a name at a block leaves a class; false if there was none.
    pub(super) fn revoke(&mut self, rank: u32, class: Class, name: u64, block: u32) -> bool {
        if let Some(twins) = self.rank_mut(rank).twins.get_mut(&block) {
            let Some(twin) = twins.iter_mut().find(|t| t.name == name) else { return false };
            let Some(i) = twin.copies.iter().position(|(c, _)| *c == class) else { return false };
            twin.copies[i].1 -= 1;
            if twin.copies[i].1 > 0 {
                return true;
            }
            twin.copies.swap_remove(i);
            if twin.copies.is_empty() {
                self.rank_mut(rank).aliases.remove(&name);
            }
            self.count_name(rank, class, 0, false);
            self.settle_twins(rank, block);
            return true;
        }
        let (run, at) = self.locate(block);
        match self.copies(rank, class, run, at, block) {
            0 => return false,
            1 => {}
            n => {
                self.set_copies(rank, class, block, n - 1);
                return true;
            }
        }
        self.lose(run, rank, class, at, at + 1);
        self.count_name(rank, class, 0, false);
        if !self.rank(rank).aliases.is_empty() && !self.holds_block(rank, block) {
            let state = self.rank_mut(rank);
            state.aliases.remove(&name);
            state.set_aliased(block, false);
        }
        true
    }

    // ---- events --------------------------------------------------------------------------------------------------------------------

    fn count_stored(applied: &mut Applied, had: u8) {
        match had {
            0 => applied.stored += 1,
            MAX_COPIES => applied.duplicates += 1,
            _ => applied.copies += 1,
        }
    }

    pub(super) fn store(
        &mut self,
        rank: u32,
        class: Class,
        parent: Option<EngineHash>,
        blocks: &[StoredBlock],
        applied: &mut Applied,
    ) {
        if let ([stored], Some(parent)) = (blocks, parent)
            && class == Class::PRIMARY
            && self.store_next(rank, parent, *stored)
        {
            applied.stored += 1;
            return;
        }
        if blocks.is_empty() {
            return;
        }
        if !self.has_room(blocks.len()) {
            applied.refused += blocks.len() as u32;
            return;
        }
        let mut rest = blocks;
        let mut after = match parent {
            None => NONE,
            Some(parent) => match self.known(rank, parent.0) {
                Known::At(block) => block,
                // The first block may tell where it is, if it is held already.
                unknown => {
                    let StoredBlock { engine, block } = blocks[0];
                    let same = |tree: &Self, at| tree.block_hash(at) == block;
                    match self.known(rank, engine.0) {
                        Known::At(at) if unknown == Known::No && same(self, at) => {
                            Self::count_stored(applied, self.grant(rank, class, engine.0, at, 1));
                            rest = &blocks[1..];
                            at
                        }
                        _ => {
                            self.store_orphans(rank, class, parent.0, blocks, applied);
                            return;
                        }
                    }
                }
            },
        };
        let mut depth = if after == NONE { 0 } else { self.depth_after(after) };
        let mut before = if after == NONE { self.shared.hasher.root() } else { self.prefix_of(after) };
        let mut prefixes = std::mem::take(&mut self.prefixes);
        prefixes.clear();
        if rest.len() < WIDE {
            for (block, depth) in rest.iter().zip(depth..) {
                before = self.shared.hasher.next(before, block.block, depth);
                prefixes.push(before);
            }
        } else {
            self.contents.clear();
            self.contents.extend(rest.iter().map(|stored| stored.block));
            self.shared.hasher.append(before, &self.contents, depth, &mut prefixes);
        }
        let mut done = 0;
        while done < rest.len() {
            if !self.rank(rank).orphans.is_empty() {
                // Orphans may move below each block of this event: one block at a time.
                let segment = self.advance(after, depth, &prefixes[done..=done], rank);
                after = self.block_at(segment.run, segment.from);
                self.store_one(rank, class, rest[done].engine.0, after, applied);
                self.link(rank, rest[done].engine.0, after, applied);
                done += 1;
                depth += 1;
                continue;
            }
            let segment = self.advance(after, depth, &prefixes[done..], rank);
            let count = segment.count as usize;
            let blocks = &rest[done..done + count];
            if segment.fresh {
                self.store_fresh(rank, class, segment, blocks, applied);
            } else {
                self.store_known(rank, class, segment, blocks, applied);
            }
            after = self.block_at(segment.run, segment.from + segment.count - 1);
            done += count;
            depth += segment.count;
        }
        self.prefixes = prefixes;
    }

    /// What a decoding engine says most: one block more, after the last one of a run that this rank alone holds, in the same
    /// page. False if it is anything else; then nothing was changed.
    fn store_next(&mut self, rank: u32, parent: EngineHash, stored: StoredBlock) -> bool {
        let name = stored.engine.0;
        if parent.0 == NAMELESS || name == NAMELESS || !self.rank(rank).plain() {
            return false;
        }
        let home = self.names.warm(spread(name));
        let Some(last) = self.main_block(parent.0) else { return false };
        let block = last + 1;
        let (run, at) = self.locate(last);
        let Meta { kids, full, depth, .. } = self.metas[run as usize];
        if block.is_multiple_of(PAGE) || kids > 0 || full != 1 {
            return false;
        }
        let (word0, before) = (self.word(run, 0), self.word(run, 2));
        let len = length(word0);
        if at + 1 != len || len >= MAX_RUN || !self.in_full(run, rank) {
            return false;
        }
        let Self { names, engines, .. } = self;
        if names.enter(name, home, block, |b| engines.get(b)) != NONE {
            return false;
        }
        engines.set(block, name);
        let prefix = self.shared.hasher.next(before, stored.block, depth + len);
        self.shared.prefixes.set(block, prefix);
        self.open(run);
        self.set_word(run, 2, prefix);
        self.close(run, len + 1, set_kind(word0));
        self.metas[run as usize].touched = self.clock;
        self.rank_mut(rank).shown(Class::PRIMARY).names += 1;
        true
    }

    /// Stores blocks whose places were made a moment ago, and which nobody holds.
    ///
    /// They are held only when they are named: a name that the rank had elsewhere leaves there first, or a reader could see it twice.
    fn store_fresh(
        &mut self,
        rank: u32,
        class: Class,
        segment: Segment,
        blocks: &[StoredBlock],
        applied: &mut Applied,
    ) {
        let Segment { run, from, .. } = segment;
        let mut at = if self.rank(rank).aliases.is_empty() { self.enter_new(run, from, blocks) } else { 0 };
        if at == blocks.len() {
            self.hold_fresh(rank, class, run, from..from + at as u32, applied);
            return;
        }
        let mut held = 0;
        for (block, stored) in self.blocks_of(run, from, blocks).into_iter().skip(at) {
            if self.known(rank, stored.engine.0) != Known::No
                || !self.name_new(rank, block, stored.engine, run)
            {
                // The rank has the name elsewhere, or in this very stretch.
                self.hold_fresh(rank, class, run, from + held as u32..from + at as u32, applied);
                self.store_one(rank, class, stored.engine.0, block, applied);
                held = at + 1;
            }
            at += 1;
        }
        self.hold_fresh(rank, class, run, from + held as u32..from + at as u32, applied);
    }

    /// Enters the main names of fresh blocks up to the first whose name has a block already; how many.
    fn enter_new(&mut self, run: u32, from: u32, blocks: &[StoredBlock]) -> usize {
        let word3 = self.word(run, 3);
        let Self { shared, engines, names, homes, .. } = self;
        homes.clear();
        homes.extend(blocks.iter().map(|stored| (names.warm(spread(stored.engine.0)), 0)));
        for &(home, _) in homes.iter() {
            names.warm_more(home, |block| engines.at(block));
        }
        let growths = names.growths();
        let mut done = 0;
        while done < blocks.len() {
            let first = shared.block_at(word3, from + done as u32);
            let here = ((PAGE - first % PAGE) as usize).min(blocks.len() - done);
            let slots = engines.stretch_mut(first, here as u32);
            for (slot, stored) in slots.iter_mut().zip(&blocks[done..]) {
                *slot = stored.engine.0;
            }
            for entered in 0..here {
                let (name, block) = (blocks[done].engine.0, first + entered as u32);
                let home = if names.growths() == growths { homes[done].0 } else { names.home(spread(name)) };
                if name == NAMELESS || names.enter(name, home, block, |b| engines.get(b)) != NONE {
                    engines.stretch_mut(block, (here - entered) as u32).fill(NAMELESS);
                    return done;
                }
                done += 1;
            }
        }
        done
    }

    /// The ids of neighbours in a run, with what is stored there.
    fn blocks_of(&self, run: u32, from: u32, blocks: &[StoredBlock]) -> Vec<(u32, StoredBlock)> {
        let word3 = self.word(run, 3);
        (from..).zip(blocks).map(|(at, stored)| (self.shared.block_at(word3, at), *stored)).collect()
    }

    /// Names a fresh block with a name that the rank has nowhere; false if a block of the same run bears it.
    fn name_new(&mut self, rank: u32, block: u32, engine: EngineHash, run: u32) -> bool {
        if self.give_main_name(block, engine) {
            return true;
        }
        if self.main_block(engine.0).is_some_and(|other| self.locate(other).0 == run) {
            return false;
        }
        let state = self.rank_mut(rank);
        state.aliases.insert(engine.0, block);
        state.set_aliased(block, true);
        true
    }

    /// A rank holds fresh blocks under the names that they were given.
    fn hold_fresh(
        &mut self,
        rank: u32,
        class: Class,
        run: u32,
        blocks: std::ops::Range<u32>,
        applied: &mut Applied,
    ) {
        if blocks.is_empty() {
            return;
        }
        self.hold(run, rank, class, blocks.start, blocks.end);
        self.rank_mut(rank).shown(class).names += u64::from(blocks.end - blocks.start);
        applied.stored += blocks.end - blocks.start;
    }

    /// Stores blocks whose places exist.
    fn store_known(
        &mut self,
        rank: u32,
        class: Class,
        segment: Segment,
        blocks: &[StoredBlock],
        applied: &mut Applied,
    ) {
        let Segment { run, from, count, .. } = segment;
        let word3 = self.word(run, 3);
        let mut at = 0;
        while at < count {
            // A stretch of main names in which nothing is held yet goes at once.
            let mut end = at;
            if self.rank(rank).plain() {
                let free = self.first_covered(self.cover(run, rank, class), from + at, from + count) - from;
                while end < free {
                    let block = self.shared.block_at(word3, from + end);
                    let here = (PAGE - block % PAGE).min(free - end);
                    let names = self.engines.stretch(block, here).iter().zip(&blocks[end as usize..]);
                    let same = names.take_while(|(name, stored)| {
                        **name == stored.engine.0 && stored.engine.0 != NAMELESS
                    });
                    let same = same.count() as u32;
                    end += same;
                    if same < here {
                        if !self.give_main_name(block + same, blocks[end as usize].engine) {
                            break;
                        }
                        end += 1;
                    }
                }
            }
            if end > at {
                self.hold(run, rank, class, from + at, from + end);
                self.rank_mut(rank).shown(class).names += u64::from(end - at);
                applied.stored += end - at;
                at = end;
            } else {
                let block = self.shared.block_at(word3, from + at);
                self.store_one(rank, class, blocks[at as usize].engine.0, block, applied);
                at += 1;
            }
        }
    }

    /// Stores one block at a place that exists: all that can happen to a name.
    pub(super) fn store_one(
        &mut self,
        rank: u32,
        class: Class,
        name: u64,
        block: u32,
        applied: &mut Applied,
    ) {
        match self.known(rank, name) {
            Known::At(old) if old != block => {
                applied.rebound += 1;
                self.forget(rank, name, old);
            }
            Known::Orphan => match self.adopt(rank, name) {
                Fate::Placed(held) => {
                    applied.linked += 1;
                    for (class, copies) in held {
                        // They were counted when they came.
                        self.rank_mut(rank).shown(class).names -= 1;
                        self.grant(rank, class, name, block, copies);
                    }
                }
                Fate::Forgotten => applied.rebound += 1,
            },
            _ => {}
        }
        Self::count_stored(applied, self.grant(rank, class, name, block, 1));
    }

    /// Stores names at the places that they have.
    pub(super) fn store_by_hash(
        &mut self,
        rank: u32,
        class: Class,
        hashes: &[EngineHash],
        applied: &mut Applied,
    ) {
        if !self.has_room(hashes.len()) {
            applied.refused += hashes.len() as u32;
            return;
        }
        for &name in hashes {
            match self.known(rank, name.0) {
                Known::At(block) => Self::count_stored(applied, self.grant(rank, class, name.0, block, 1)),
                Known::Orphan | Known::No => self.store_placeless(rank, class, name.0, applied),
            }
        }
    }

    pub(super) fn depth_after(&self, block: u32) -> u32 {
        let (run, at) = self.locate(block);
        self.metas[run as usize].depth + at + 1
    }

    /// The content of a block, from its prefix hash and the one before.
    pub(super) fn block_hash(&self, block: u32) -> BlockHash {
        let (run, at) = self.locate(block);
        let meta = self.metas[run as usize];
        let before = match (at, meta.parent) {
            (0, NONE) => self.shared.hasher.root(),
            (0, parent) => self.prefix_of(parent),
            _ => self.prefix_of(self.block_at(run, at - 1)),
        };
        self.shared.hasher.block(before, self.prefix_of(block), meta.depth + at)
    }
}

/// Adds copies to a list of them; how many there were.
pub(super) fn add_copies(copies: &mut Vec<(Class, u8)>, class: Class, more: u8) -> u8 {
    match copies.iter_mut().find(|(c, _)| *c == class) {
        Some((_, n)) => {
            let had = *n;
            *n = had.saturating_add(more).min(MAX_COPIES);
            had
        }
        None => {
            copies.push((class, more.min(MAX_COPIES)));
            0
        }
    }
}
