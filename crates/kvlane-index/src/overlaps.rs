//! The answer to "who holds the beginning of this prompt?"
//!
//! Filled by the index, read by the scheduler. The caller owns and reuses it, so a query allocates nothing
//! once warm. [`Overlaps`] has an entry for each worker; [`DepthGroups`] says the same in sets of workers, which costs little however many
//! there are.

use std::sync::Weak;

use crate::Worker;
use crate::tree::Shared;

/// What one worker holds of a prompt, in blocks of the index's block size.
///
/// `device` and `predicted` are depths from the root. `host`, `disk` and `external` are *additional* blocks, counted
/// in one pass from the confirmed device depth: host first, then disk from there, then external; no block is counted
/// twice, and a prediction never anchors a lower tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overlap {
    /// Who.
    pub worker: Worker,
    /// Leading blocks confirmed in the device tier (for hybrid models: the longest usable hit).
    pub device: u32,
    /// Leading blocks in the device tier or predicted to be there; at least `device`.
    pub predicted: u32,
    /// Blocks in host memory that continue the device run.
    pub host: u32,
    /// Blocks on disk that continue from there.
    pub disk: u32,
    /// Blocks in external storage that continue from there.
    pub external: u32,
    /// The run from the root when the tiers may alternate block by block; at least the sum of the single pass.
    pub mixed: u32,
}

impl Overlap {
    /// Of a worker that holds `depth` leading blocks in the device tier, and nothing else of the prompt.
    #[inline]
    pub(crate) fn on_device(worker: Worker, depth: u32) -> Self {
        Self { worker, device: depth, predicted: depth, host: 0, disk: 0, external: 0, mixed: depth }
    }
}

/// The overlaps of one prompt, sorted by worker.
///
/// A worker that holds nothing of the prompt is absent, not zero. Never more than the engines' events support
/// (see the *Consistency* section of the index).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Overlaps {
    /// One entry for each worker with any figure above 0.
    pub ranks: Vec<Overlap>,
}

impl Overlaps {
    /// The entry of `worker`, if it holds anything of the prompt.
    pub fn get(&self, worker: Worker) -> Option<&Overlap> {
        self.ranks.binary_search_by_key(&worker, |o| o.worker).ok().map(|i| &self.ranks[i])
    }
}

/// The overlaps of one prompt as sets of workers with one device depth, deepest first.
///
/// A prompt has few depths at which workers part, so this is the cheap answer for large fleets. Each worker with a device depth above 0 is
/// in one group; what a worker has besides it (predictions, lower tiers) is in [`others`](Self::others). The same guarantees hold as for
/// [`Overlaps`].
///
/// ```
/// # use kvlane_index::*;
/// # let size = BlockSize::new(16).expect("16 is not 0");
/// # let (mut writer, index) = partition(IndexConfig::new(size));
/// # for (worker, count) in [(1, 2), (2, 3), (3, 2)] {
/// #     let blocks = (1..=count).map(|b| StoredBlock { engine: EngineHash(b), block: BlockHash(b) }).collect();
/// #     let event = KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks };
/// #     let _ = writer.apply(Worker::new(worker, 0), &event);
/// # }
/// // Workers 1 and 3 hold two blocks, worker 2 holds three.
/// let mut groups = DepthGroups::default();
/// index.depth_groups(&[BlockHash(1), BlockHash(2), BlockHash(3)], &mut groups);
/// let listed: Vec<(u32, Vec<u64>)> =
///     groups.iter().map(|g| (g.depth, g.workers().map(|w| w.instance.0).collect())).collect();
/// assert_eq!(listed, [(3, vec![2]), (2, vec![1, 3])]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct DepthGroups {
    pub(crate) groups: Groups,
    pub(crate) others: Vec<Overlap>,
    pub(crate) names: Names,
}

/// The workers that have one device depth.
#[derive(Clone, Copy, Debug)]
pub struct DepthGroup<'g> {
    /// Leading blocks that each of them holds in the device tier; above 0.
    pub depth: u32,
    set: &'g [u64],
    ones: &'g [(u32, u32)],
    names: &'g Names,
}

impl DepthGroups {
    /// The groups, deepest first.
    pub fn iter(&self) -> impl Iterator<Item = DepthGroup<'_>> {
        let mut ones = &self.groups.ones[..];
        let mut sets = self.groups.sets.iter().rev().peekable();
        std::iter::from_fn(move || {
            let single = ones.first().map_or(0, |(depth, _)| *depth);
            let depth = sets.peek().map_or(0, |(depth, ..)| *depth).max(single);
            let set = sets.next_if(|set| set.0 == depth).map_or(&[][..], |set| self.groups.words(set));
            let (mine, rest) = ones.split_at(ones.iter().take_while(|(d, _)| *d == depth).count());
            ones = rest;
            (depth > 0).then_some(DepthGroup { depth, set, ones: mine, names: &self.names })
        })
    }

    /// The overlaps of the workers that have more than a device depth, sorted by worker; their device depths are among the groups too.
    pub fn others(&self) -> &[Overlap] {
        &self.others
    }

    /// The same answer worker by worker, into `out` (which is emptied first).
    pub fn list(&self, out: &mut Overlaps) {
        out.ranks.clear();
        for group in self.iter() {
            let plain = group.workers().map(|worker| Overlap::on_device(worker, group.depth));
            out.ranks.extend(
                plain.filter(|o| self.others.binary_search_by_key(&o.worker, |other| other.worker).is_err()),
            );
        }
        out.ranks.extend_from_slice(&self.others);
        out.ranks.sort_unstable_by_key(|overlap| overlap.worker);
    }

    pub(crate) fn clear(&mut self) {
        self.groups.clear();
        self.others.clear();
    }
}

impl<'g> DepthGroup<'g> {
    /// How many workers it has.
    #[expect(clippy::len_without_is_empty, reason = "a group has members")]
    pub fn len(&self) -> usize {
        self.ones.len() + self.set.iter().map(|word| word.count_ones() as usize).sum::<usize>()
    }

    /// The workers, in no order.
    pub fn workers(&self) -> impl Iterator<Item = Worker> + use<'g> {
        let names = self.names;
        let ones = self.ones.iter().map(|(_, rank)| *rank);
        bits(self.set).chain(ones).filter_map(|rank| names.workers.get(rank as usize).copied())
    }
}

/// Ranks by the device depth that they reach: sets, and single ranks.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    /// Depth, and the place and number of the words of its set; in ascending order, each depth once.
    sets: Vec<(u32, usize, usize)>,
    words: Vec<u64>,
    /// Depth and rank.
    ones: Vec<(u32, u32)>,
    /// Where the set begins that is being made.
    open: usize,
}

impl Default for Groups {
    fn default() -> Self {
        Self::NONE
    }
}

impl Groups {
    pub(crate) const NONE: Self = Self { sets: Vec::new(), words: Vec::new(), ones: Vec::new(), open: 0 };

    pub(crate) fn clear(&mut self) {
        self.sets.clear();
        self.words.clear();
        self.ones.clear();
    }

    fn words(&self, set: &(u32, usize, usize)) -> &[u64] {
        &self.words[set.1..set.1 + set.2]
    }

    /// Begins a set, deeper than all before, as a copy of `words`.
    #[inline]
    pub(crate) fn begin(&mut self, words: &[u64]) -> &mut [u64] {
        self.open = self.words.len();
        self.words.extend_from_slice(words);
        &mut self.words[self.open..]
    }

    /// Ends the set that was begun; an empty one is forgotten.
    #[inline]
    pub(crate) fn end(&mut self, depth: u32) {
        let used = self.words[self.open..].iter().rposition(|word| *word != 0).map_or(0, |at| at + 1);
        self.words.truncate(self.open + used);
        if used > 0 {
            self.sets.push((depth, self.open, used));
        }
    }

    /// Adds a set of ranks below 128.
    #[inline]
    pub(crate) fn add_pair(&mut self, depth: u32, words: [u64; 2]) {
        let used = if words[1] != 0 { 2 } else { usize::from(words[0] != 0) };
        if used > 0 {
            self.sets.push((depth, self.words.len(), used));
            self.words.extend_from_slice(&words);
        }
    }

    pub(crate) fn add(&mut self, depth: u32, words: &[u64]) {
        self.begin(words);
        self.end(depth);
    }

    /// Adds a single rank, unless it reaches nothing.
    #[inline]
    pub(crate) fn add_one(&mut self, depth: u32, rank: u32) {
        if depth > 0 {
            self.ones.push((depth, rank));
        }
    }

    pub(crate) fn drop_rank(&mut self, rank: u32) {
        self.ones.retain(|(_, other)| *other != rank);
        for &(_, from, len) in &self.sets {
            if let Some(word) = self.words[from..from + len].get_mut(rank as usize / 64) {
                *word &= !(1 << (rank % 64));
            }
        }
    }

    /// Ranks in all groups.
    pub(crate) fn count(&self) -> usize {
        self.ones.len() + self.words.iter().map(|word| word.count_ones() as usize).sum::<usize>()
    }

    /// Calls `each` with the depth and the number of each rank.
    #[inline]
    pub(crate) fn each(&self, mut each: impl FnMut(u32, u32)) {
        for set in &self.sets {
            bits(self.words(set)).for_each(|rank| each(set.0, rank));
        }
        self.ones.iter().for_each(|(depth, rank)| each(*depth, *rank));
    }

    /// Writes each rank's depth to its place in `depths`.
    #[inline]
    pub(crate) fn spread(&self, depths: &mut [u32]) {
        for set in &self.sets {
            for (word, depths) in self.words(set).iter().zip(depths.chunks_mut(64)) {
                if *word == u64::MAX {
                    depths.fill(set.0);
                    continue;
                }
                let mut word = *word;
                while word != 0 {
                    if let Some(depth) = depths.get_mut(word.trailing_zeros() as usize) {
                        *depth = set.0;
                    }
                    word &= word - 1;
                }
            }
        }
        for (depth, rank) in &self.ones {
            if let Some(place) = depths.get_mut(*rank as usize) {
                *place = *depth;
            }
        }
    }

    /// Sorts the single ranks, deepest first, and leaves out sets that lost their members.
    pub(crate) fn arrange(&mut self) {
        self.ones.sort_unstable_by(|a, b| b.cmp(a));
        let Self { sets, words, .. } = self;
        sets.retain(|(_, from, len)| words[*from..*from + *len].iter().any(|word| *word != 0));
    }
}

/// The bits of a set.
fn bits(set: &[u64]) -> impl Iterator<Item = u32> {
    (0u32..).step_by(64).zip(set).flat_map(|(first, word)| {
        let mut word = *word;
        std::iter::from_fn(move || {
            let bit = word.trailing_zeros();
            (word != 0).then(|| {
                word &= word - 1;
                first + bit
            })
        })
    })
}

/// The workers by rank number, as they were in one version of a partition's directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    workers: Vec<Worker>,
    of: Weak<Shared>,
    version: u64,
}

impl Names {
    /// Takes the names anew if they are not those of this partition and version.
    pub(crate) fn renew(
        &mut self,
        of: &std::sync::Arc<Shared>,
        version: u64,
        workers: impl Iterator<Item = Worker>,
    ) {
        if self.version != version || !std::ptr::eq(self.of.as_ptr(), std::sync::Arc::as_ptr(of)) {
            self.workers.clear();
            self.workers.extend(workers);
            self.of = std::sync::Arc::downgrade(of);
            self.version = version;
        }
    }
}
