//! Blocks that a rank will soon hold, as far as the router knows.
//!
//! A prediction lies in the runs like the holdings do, as a beginning of each run that the prompt goes through, with a deadline.
//! For one rank and run, a longer beginning is kept beside a shorter one only if its deadline is sooner.

use std::cmp::Reverse;
use std::sync::atomic::Ordering::Relaxed;

use super::Tree;
use super::shared::{NONE, set_kind};
use crate::{BlockHash, Worker};

/// A prediction in one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Prediction {
    rank: u32,
    blocks: u32,
    pub(super) until_ms: u64,
}

impl Prediction {
    fn words(self) -> [u64; 2] {
        [u64::from(self.rank) << 32 | u64::from(self.blocks), self.until_ms]
    }

    fn dominates(self, other: Self) -> bool {
        self.rank == other.rank && self.blocks >= other.blocks && self.until_ms >= other.until_ms
    }
}

fn decode(words: &[u64]) -> impl Iterator<Item = Prediction> + '_ {
    words.chunks_exact(2).map(|pair| Prediction {
        rank: (pair[0] >> 32) as u32,
        blocks: pair[0] as u32,
        until_ms: pair[1],
    })
}

/// Adds a prediction to those of a run; false if it says nothing new.
fn add(list: &mut Vec<Prediction>, new: Prediction) -> bool {
    if list.iter().any(|old| old.dominates(new)) {
        return false;
    }
    list.retain(|old| !new.dominates(*old));
    list.push(new);
    true
}

impl Tree {
    fn predictions(&self, run: u32) -> Vec<Prediction> {
        decode(&self.list_words(self.word(run, 7))).collect()
    }

    fn write_predictions(&mut self, run: u32, predictions: &[Prediction]) {
        let words: Vec<u64> = predictions.iter().flat_map(|p| p.words()).collect();
        let old = self.word(run, 7);
        let new = self.list_from(&words);
        let (len, kind) = (self.len(run), set_kind(self.word(run, 0)));
        self.open(run);
        self.set_word(run, 7, new);
        self.close(run, len, kind);
        self.list_free(old);
    }

    pub(crate) fn predict(&mut self, worker: Worker, blocks: &[BlockHash], until_ms: u64) {
        if blocks.is_empty() || !self.has_room(blocks.len()) {
            return;
        }
        self.clock = self.clock.saturating_add(1);
        let Some(rank) = self.meet(worker) else { return };
        let mut prefixes = std::mem::take(&mut self.prefixes);
        prefixes.clear();
        self.shared.hasher.extend(blocks, blocks.len(), &mut prefixes);
        let (mut after, mut done) = (NONE, 0);
        while done < prefixes.len() {
            let segment = self.advance(after, done as u32, &prefixes[done..], rank);
            let end = segment.from + segment.count;
            let mut list = self.predictions(segment.run);
            if add(&mut list, Prediction { rank, blocks: end, until_ms }) {
                self.write_predictions(segment.run, &list);
                self.deadlines.push(Reverse((until_ms, segment.run)));
                self.enters(rank, segment.run);
            }
            after = self.block_at(segment.run, end - 1);
            done += segment.count as usize;
        }
        self.prefixes = prefixes;
        self.rank_mut(rank).predicts = true;
        self.reap();
        self.shed_if_due();
    }

    pub(crate) fn expire(&mut self, now_ms: u64) -> u64 {
        while let Some(Reverse((until_ms, run))) = self.deadlines.peek().copied()
            && until_ms <= now_ms
        {
            self.deadlines.pop();
            self.keep_predictions(run, |p| p.until_ms > now_ms);
        }
        self.reap();
        let max_age_ms = self.config.max_orphan_age_ms;
        let ranks: Vec<u32> = self.by_worker.values().copied().collect();
        let old = ranks.into_iter().map(|rank| u64::from(self.drop_orphans(rank, now_ms, max_age_ms))).sum();
        self.orphans_expired += old;
        old
    }

    pub(crate) fn forget_predictions(&mut self, worker: Worker) {
        let Some(&rank) = self.by_worker.get(&worker) else { return };
        if !std::mem::take(&mut self.rank_mut(rank).predicts) {
            return;
        }
        for run in self.rank(rank).runs.clone() {
            self.drop_predictions(run, rank);
        }
        self.reap();
    }

    pub(super) fn drop_predictions(&mut self, run: u32, rank: u32) {
        self.keep_predictions(run, |p| p.rank != rank);
    }

    pub(super) fn keep_predictions(&mut self, run: u32, keep: impl Fn(&Prediction) -> bool) {
        if self.len(run) == 0 || self.word(run, 7) == 0 {
            return;
        }
        let mut list = self.predictions(run);
        let before = list.len();
        list.retain(keep);
        if list.len() < before {
            self.write_predictions(run, &list);
            self.dying.push(run);
        }
    }

    /// Divides the predictions of a run that was split at `at`.
    pub(super) fn split_predictions(&mut self, run: u32, upper: u32, at: u32, words: &[u64]) {
        if words.is_empty() {
            return;
        }
        let (mut low, mut high) = (Vec::new(), Vec::new());
        for prediction in decode(words) {
            add(&mut low, Prediction { blocks: prediction.blocks.min(at), ..prediction });
            if prediction.blocks > at {
                high.push(Prediction { blocks: prediction.blocks - at, ..prediction });
            }
        }
        self.write_predictions(run, &low);
        self.write_predictions(upper, &high);
        for prediction in high {
            self.deadlines.push(Reverse((prediction.until_ms, upper)));
            self.enters(prediction.rank, upper);
        }
    }

    /// One past the last block of a run that is predicted for some rank.
    pub(super) fn predictions_end(&self, run: u32) -> u32 {
        let items = self.shared.items(self.word(run, 7));
        items.iter().step_by(2).map(|item| item.load(Relaxed) as u32).max().unwrap_or(0)
    }

    /// One past the last block of a run that is predicted for a rank.
    pub(super) fn predicted_end(&self, run: u32, rank: u32) -> u32 {
        self.predictions(run).iter().filter(|p| p.rank == rank).map(|p| p.blocks).max().unwrap_or(0)
    }

    /// Predicted (rank, block) pairs.
    pub(super) fn predicted_pairs(&self) -> u64 {
        let mut pairs = 0;
        for run in self.live_runs().filter(|&run| self.word(run, 7) != 0) {
            let mut ranks: Vec<u32> = self.predictions(run).iter().map(|p| p.rank).collect();
            ranks.sort_unstable();
            ranks.dedup();
            pairs += ranks.iter().map(|&rank| u64::from(self.predicted_end(run, rank))).sum::<u64>();
        }
        pairs
    }
}
