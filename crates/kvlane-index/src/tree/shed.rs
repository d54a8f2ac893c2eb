//! Staying inside the memory budget.
//!
//! Over the budget, the index forgets until it is a sixteenth below: first predictions, the soonest deadline first; then what
//! lies in lower tiers, and at last the device tier, both from the runs in which something was stored longest ago, ends of prompts
//! before their beginnings. What is shed is forgotten as if the engine had removed it, so that the rest stays exact; a later
//! removal of it is counted as unknown. The tables do not shrink, so a budget that is smaller than they are leaves nothing.

use std::cmp::Reverse;
use std::sync::atomic::Ordering::Relaxed;

use super::Tree;
use super::shared::{Class, Part, set_kind};
use crate::Tier;

/// Events between two looks at the budget.
const LOOK_EVERY: u32 = 64;
/// Runs or deadlines shed between two looks at the bytes left.
const BATCH: usize = 64;

impl Tree {
    /// Every few events, sheds what is over the budget; how many engine hashes were forgotten.
    pub(super) fn shed_if_due(&mut self) -> u32 {
        match self.config.budget_bytes {
            Some(budget) if self.clock.is_multiple_of(LOOK_EVERY) && self.bytes() > budget => {
                self.shed(budget - budget / 16)
            }
            _ => 0,
        }
    }

    fn shed(&mut self, target: u64) -> u32 {
        while self.bytes() > target && !self.deadlines.is_empty() {
            for _ in 0..BATCH {
                let Some(Reverse((until_ms, run))) = self.deadlines.pop() else { break };
                self.keep_predictions(run, |p| p.until_ms > until_ms);
            }
            self.deadlines.shrink_to_fit();
            self.reap();
        }
        let lower = |class: Class| class.tier() != Tier::Device;
        let mut names = self.shed_coldest(target, lower, false);
        // Shedding the ends of prompts makes new ends.
        loop {
            let shed = self.shed_coldest(target, |_| true, true);
            names += shed;
            if shed == 0 || self.bytes() <= target {
                return names;
            }
        }
    }

    /// Sheds some classes of the coldest runs, of all or only of those that nothing follows.
    fn shed_coldest(&mut self, target: u64, which: impl Fn(Class) -> bool, ends_only: bool) -> u32 {
        if self.bytes() <= target {
            return 0;
        }
        let mut runs: Vec<u32> =
            self.live_runs().filter(|&run| !ends_only || self.metas[run as usize].kids == 0).collect();
        runs.sort_unstable_by_key(|&run| self.metas[run as usize].touched);
        let mut names = 0;
        for batch in runs.chunks(BATCH) {
            for &run in batch {
                names += self.shed_run(run, &which);
            }
            self.reap();
            if self.bytes() <= target {
                break;
            }
        }
        names
    }

    fn shed_run(&mut self, run: u32, which: impl Fn(Class) -> bool) -> u32 {
        let mut holders: Vec<(u32, Class)> = self
            .shared
            .items(self.word(run, 6))
            .iter()
            .map(|item| Part::decode(item.load(Relaxed)))
            .map(|part| (part.rank, part.class))
            .collect();
        let set = [self.word(run, 4), self.word(run, 5)];
        self.shared.set_each(set_kind(self.word(run, 0)), set, |rank| holders.push((rank, Class::PRIMARY)));
        let mut names = 0;
        for (rank, class) in holders.into_iter().filter(|(_, class)| which(*class)) {
            let cover = self.cover(run, rank, class);
            let held: Vec<u32> = (0..self.len(run)).filter(|&at| self.covers(cover, at)).collect();
            for at in held {
                names += self.forget_class(rank, class, self.block_at(run, at));
            }
        }
        names
    }
}
