//! Blocks leave a tier.

use super::Tree;
use super::cover::Cover;
use super::names::spread;
use super::runs::NAMELESS;
use super::shared::{Class, PAGE};
use super::store::Known;
use crate::{Applied, EngineHash, Tier};

impl Tree {
    pub(super) fn remove(&mut self, rank: u32, class: Class, hashes: &[EngineHash], applied: &mut Applied) {
        if !self.rank(rank).classes.iter().any(|c| c.class == class) {
            applied.unknown += hashes.len() as u32;
            return;
        }
        let mut rest = hashes;
        let mut scattered = false;
        while let Some(first) = rest.first() {
            let gone = self.remove_stretch(rank, class, rest);
            if gone < rest.len() && !scattered {
                // They are looked up one by one, or almost.
                scattered = true;
                for name in &rest[gone..] {
                    self.names.warm(spread(name.0));
                }
            }
            if gone > 0 {
                applied.removed += gone as u32;
                rest = &rest[gone..];
                continue;
            }
            if self.remove_one(rank, class, first.0) {
                applied.removed += 1;
            } else {
                applied.unknown += 1;
            }
            rest = &rest[1..];
        }
    }

    fn remove_one(&mut self, rank: u32, class: Class, name: u64) -> bool {
        match self.known(rank, name) {
            Known::No => false,
            Known::At(block) => self.revoke(rank, class, name, block),
            Known::Orphan => match self.rank_mut(rank).orphans.revoke(name, class) {
                None => false,
                Some(last) => {
                    self.rank_mut(rank).shown(class).names -= u64::from(last);
                    true
                }
            },
        }
    }

    /// Removes as many of the first hashes as are neighbours in one run, in one direction; 0 if the first is not plainly held.
    fn remove_stretch(&mut self, rank: u32, class: Class, hashes: &[EngineHash]) -> usize {
        if !self.rank(rank).plain() {
            return 0;
        }
        let Some(block) = self.main_block(hashes[0].0) else { return 0 };
        let (run, first) = self.locate(block);
        let cover = self.cover(run, rank, class);
        if !self.covers(cover, first) || self.rank(rank).has_copies(class, block) {
            return 0;
        }
        let (len, word3) = (self.len(run), self.word(run, 3));
        let follows = |at: u32, name: EngineHash| {
            let block = self.shared.block_at(word3, at);
            let plain = self.is_main(block, name.0) && !self.rank(rank).has_copies(class, block);
            plain && self.covers(cover, at)
        };
        let (mut low, mut high) = (first, first);
        let mut count = 1;
        // Engines evict from the end of a prompt, so the next is mostly the one before.
        if cover.is_beginning() && self.rank(rank).copies.is_empty() {
            while count < hashes.len() && low > 0 {
                let last = self.shared.block_at(word3, low - 1);
                let here = (last % PAGE + 1).min(low);
                let names = self.engines.stretch(last + 1 - here, here).iter().rev();
                let same = names
                    .zip(&hashes[count..])
                    .take_while(|(name, gone)| **name == gone.0 && gone.0 != NAMELESS)
                    .count();
                low -= same as u32;
                count += same;
                if same < here as usize {
                    break;
                }
            }
        } else {
            while count < hashes.len() && low > 0 && follows(low - 1, hashes[count]) {
                low -= 1;
                count += 1;
            }
        }
        if count == 1 {
            while count < hashes.len() && high + 1 < len && follows(high + 1, hashes[count]) {
                high += 1;
                count += 1;
            }
        }
        let meta = self.metas[run as usize];
        let alone = cover == Cover::Full && meta.full == 1 && meta.kids == 0;
        if alone && low > 0 && high + 1 == len && self.word(run, 6) == 0 && self.word(run, 7) == 0 {
            // The only holder loses the end: the run becomes shorter and stays wholly held.
            self.cut(run, low);
        } else {
            self.lose(run, rank, class, low, high + 1);
        }
        self.rank_mut(rank).shown(class).names -= count as u64;
        count
    }

    /// A rank loses everything in one tier.
    pub(super) fn clear_tier(&mut self, rank: u32, tier: Tier, applied: &mut Applied) {
        let gone = |class: Class| class.tier() == tier;
        let classes: Vec<Class> =
            self.rank(rank).classes.iter().map(|c| c.class).filter(|c| gone(*c)).collect();
        let in_twins: Vec<u32> = self.rank(rank).twins.keys().copied().collect();
        for block in in_twins {
            let state = self.rank_mut(rank);
            for twin in state.twins.get_mut(&block).expect("listed a moment ago") {
                twin.copies.retain(|(class, _)| !gone(*class));
                if twin.copies.is_empty() {
                    state.aliases.remove(&twin.name);
                }
            }
            self.settle_twins(rank, block);
        }
        self.rank_mut(rank).copies.retain(|(class, _), _| !gone(Class(*class)));
        for run in self.rank(rank).runs.clone() {
            for &class in &classes {
                if self.len(run) > 0 {
                    self.lose(run, rank, class, 0, self.len(run));
                }
            }
        }
        let homeless: Vec<(u64, u32)> = self
            .rank(rank)
            .aliases
            .iter()
            .filter(|(_, block)| {
                !self.rank(rank).twins.contains_key(block) && !self.holds_block(rank, **block)
            })
            .map(|(name, block)| (*name, *block))
            .collect();
        let state = self.rank_mut(rank);
        for (name, block) in homeless {
            state.aliases.remove(&name);
            state.set_aliased(block, false);
        }
        state.orphans.drop_classes(gone);
        let names: u64 = state.classes.iter().filter(|c| gone(c.class)).map(|c| c.names).sum();
        applied.cleared += names as u32;
        state.classes.retain(|c| !gone(c.class));
        self.triples -= classes.len() as u32;
        self.publish_kinds(rank);
    }
}
