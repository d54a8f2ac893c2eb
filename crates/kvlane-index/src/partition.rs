//! One partition of the index: a writer that applies events and handles that answer.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::hash::{Namespace, prompt_hashes_in_stretches};
use crate::tree::{Plan, Shared, Tree};
use crate::{
    Applied, BlockHash, BlockSize, DepthGroups, Held, IndexConfig, IndexStats, InstanceId, KvEvent, Overlaps,
    Tier, Worker,
};

/// Makes the writer and the first reader of an empty partition: one model family and one block size.
///
/// ```
/// use kvlane_index::{BlockHash, BlockSize, EngineHash, Group, IndexConfig, KvEvent, Overlaps, StoredBlock, Tier, Worker};
///
/// let size = BlockSize::new(16).expect("16 is not 0");
/// let (mut writer, index) = kvlane_index::partition(IndexConfig::new(size));
/// let worker = Worker::new(7, 0);
/// let blocks = vec![StoredBlock { engine: EngineHash(100), block: BlockHash(1) }];
/// let applied = writer.apply(
///     worker,
///     &KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks },
/// );
/// assert_eq!(applied.stored, 1);
///
/// let mut overlaps = Overlaps::default();
/// index.overlap(&[BlockHash(1), BlockHash(2)], &mut overlaps);
/// assert_eq!(overlaps.get(worker).expect("it holds the first block").device, 1);
/// ```
pub fn partition(config: IndexConfig) -> (IndexWriter, Index) {
    let tree = Tree::new(&config);
    let shared = Arc::clone(tree.shared());
    let tree = Arc::new(Mutex::new(tree));
    let index = Index { shared, tree: Arc::clone(&tree), block_size: config.block_size };
    (IndexWriter { tree, config }, index)
}

/// The hashes of one prompt: of its blocks, for anybody, and of its prefixes, for partitions with the same key.
///
/// Reuse one: hashing into it allocates nothing once it is large enough.
#[derive(Clone, Debug, Default)]
pub struct HashedPrompt {
    blocks: Vec<BlockHash>,
    prefixes: Vec<u64>,
    /// Stands for the key of `prefixes`.
    root: u64,
}

impl HashedPrompt {
    /// The hashes of the prompt's whole blocks.
    pub fn blocks(&self) -> &[BlockHash] {
        &self.blocks
    }
}

/// Applies the events of a partition, each worker's in the order of its publisher.
#[derive(Debug)]
pub struct IndexWriter {
    tree: Arc<Mutex<Tree>>,
    config: IndexConfig,
}

/// A rank's content being exchanged for a dump's; made by [`IndexWriter::replace`].
#[derive(Debug)]
#[must_use = "nothing changes before the first part is done"]
pub struct Replacement(Plan);

impl Replacement {
    /// Does the next part, and says what changed; `None` when all is done. A part ends with the run in which `blocks` blocks were looked
    /// at (see [`PART`](Self::PART)).
    pub fn part(&mut self, writer: &mut IndexWriter, blocks: u32) -> Option<Applied> {
        lock(&writer.tree).replace_part(&mut self.0, blocks)
    }

    /// Blocks of a part that holds up nobody for long: about a millisecond.
    pub const PART: u32 = 4096;

    /// Does all that is left at once.
    pub fn finish(mut self, writer: &mut IndexWriter) -> Applied {
        let mut applied = Applied::default();
        while let Some(part) = self.part(writer, u32::MAX) {
            applied += part;
        }
        applied
    }
}

/// Answers questions about a partition; cheap to clone and to share.
///
/// # Consistency
///
/// [`overlap`](Self::overlap) and [`depth_groups`](Self::depth_groups) take no lock, wait for nobody and write nothing that is shared. They see every event
/// whose `apply` returned, and every prediction whose `predict` returned, before the call began; they may see some of what
/// is applied while they run. The answer was true at one moment during the call, or, when the runs that the prompt goes through keep
/// changing under it, is less than that; it is never more.
///
/// The other calls wait for the event that is being applied, and hold up the next one.
#[derive(Clone, Debug)]
pub struct Index {
    shared: Arc<Shared>,
    tree: Arc<Mutex<Tree>>,
    block_size: BlockSize,
}

impl IndexWriter {
    /// Applies one event of `worker`; never fails: what it could not do, it counts.
    pub fn apply(&mut self, worker: Worker, event: &KvEvent) -> Applied {
        lock(&self.tree).apply(worker, event)
    }

    /// Begins to make `worker` hold what `dump` says (events of [`Index::dump`], of this or another partition), instead of what it holds.
    ///
    /// Nothing changes before the first [`part`](Replacement::part). Between parts the events of other workers may be applied, and none of
    /// this worker: those wait until the last part is done. Readers see, of each prompt, a part of the old content until all is
    /// removed that the dump does not have, and then a part of the new one: never more than one of them says. What both have stays in
    /// sight throughout. Predictions of the worker stay; orphans go.
    ///
    /// This call takes time and memory in proportion to the dump, and holds up nobody.
    pub fn replace(&self, worker: Worker, dump: &[KvEvent]) -> Replacement {
        Replacement(Plan::new(&self.config, worker, dump))
    }

    /// Forgets everything about one rank.
    pub fn remove_worker(&mut self, worker: Worker) -> Applied {
        lock(&self.tree).remove_worker(worker)
    }

    /// Forgets everything about all ranks of one instance.
    pub fn remove_instance(&mut self, instance: InstanceId) -> Applied {
        lock(&self.tree).remove_instance(instance)
    }
}

impl Index {
    /// Who holds the beginning of `prompt`, into `out` (which is emptied first).
    pub fn overlap(&self, prompt: &[BlockHash], out: &mut Overlaps) {
        self.shared.overlap(prompt, out);
    }

    /// Tokens in a block of this partition.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Hashes the whole blocks of a prompt for this partition, into `out` (which is emptied first).
    ///
    /// For a prompt that is asked about more than once, or whose tokens are being hashed anyway: the answer to
    /// [`overlap_hashed`](Self::overlap_hashed) then costs a few looks, however long the prompt is.
    pub fn hash(&self, tokens: &[u32], namespace: &Namespace<'_>, out: &mut HashedPrompt) {
        let HashedPrompt { blocks, prefixes, root } = out;
        let hasher = self.shared.hasher();
        blocks.clear();
        prefixes.clear();
        prompt_hashes_in_stretches(tokens, self.block_size, namespace, blocks, |blocks| {
            hasher.extend(blocks, blocks.len(), prefixes);
        });
        *root = hasher.root();
    }

    /// The same from block hashes.
    pub fn hash_prompt(&self, blocks: &[BlockHash], out: &mut HashedPrompt) {
        let hasher = self.shared.hasher();
        out.blocks.clear();
        out.blocks.extend_from_slice(blocks);
        out.prefixes.clear();
        hasher.extend(blocks, blocks.len(), &mut out.prefixes);
        out.root = hasher.root();
    }

    /// [`overlap`](Self::overlap) of a prompt hashed for this partition; one hashed for a partition with another prefix key
    /// is hashed again.
    pub fn overlap_hashed(&self, prompt: &HashedPrompt, out: &mut Overlaps) {
        if prompt.root == self.shared.hasher().root() {
            self.shared.overlap_hashed(&prompt.prefixes, out);
        } else {
            self.shared.overlap(&prompt.blocks, out);
        }
    }

    /// Who holds the beginning of `prompt`, as sets of workers, into `out` (which is emptied first).
    ///
    /// The answer of [`overlap`](Self::overlap), with the same guarantees, at a cost that hardly grows with the number of workers.
    pub fn depth_groups(&self, prompt: &[BlockHash], out: &mut DepthGroups) {
        self.shared.depth_groups(prompt, out);
    }

    /// [`depth_groups`](Self::depth_groups) of a prompt hashed for this partition, as in [`overlap_hashed`](Self::overlap_hashed).
    pub fn depth_groups_hashed(&self, prompt: &HashedPrompt, out: &mut DepthGroups) {
        if prompt.root == self.shared.hasher().root() {
            self.shared.depth_groups_hashed(&prompt.prefixes, out);
        } else {
            self.shared.depth_groups(&prompt.blocks, out);
        }
    }

    /// Notes that `worker` will soon hold these blocks, which begin at the root of a prompt.
    ///
    /// Visible to the next `overlap` of every handle. A prefix predicted twice keeps the later deadline.
    pub fn predict(&self, worker: Worker, blocks: &[BlockHash], until_ms: u64) {
        lock(&self.tree).predict(worker, blocks, until_ms);
    }

    /// Drops the predictions with `until_ms <= now_ms`, and the orphans that have waited for
    /// [`max_orphan_age_ms`](IndexConfig::max_orphan_age_ms); how many (tier, group, engine hash) pairs of orphans those were.
    ///
    /// Time is the caller's: any clock that does not go back. Call it every second or so; the cost is that of what is due, and a look at
    /// each orphan.
    pub fn expire(&self, now_ms: u64) -> u64 {
        lock(&self.tree).expire(now_ms)
    }

    /// Drops the predictions of one rank.
    pub fn forget_predictions(&self, worker: Worker) {
        lock(&self.tree).forget_predictions(worker);
    }

    /// What each rank holds, sorted by worker, tier and group; a group that was shown is listed even if it is empty.
    pub fn workers(&self) -> Vec<Held> {
        lock(&self.tree).workers()
    }

    /// Figures of the partition. Cost: one look at each run.
    pub fn stats(&self) -> IndexStats {
        lock(&self.tree).stats()
    }

    /// The events that give an empty index what `worker` holds at known places: the same events for the same content.
    ///
    /// They begin by showing the worker's groups, in events that store nothing; then come tier by tier and group by group the chains held
    /// there, in the order of a walk through the prefix tree. A block below a hole is preceded by fillers for the hole, which are
    /// removed again by the last events. Predictions and orphans are left out. Holds up writers for as long as it takes.
    pub fn dump(&self, worker: Worker) -> Vec<KvEvent> {
        lock(&self.tree).dump(worker, None)
    }

    /// [`dump`](Self::dump) of one tier alone, complete in itself: what a chain there follows in another tier is filled in.
    pub fn dump_tier(&self, worker: Worker, tier: Tier) -> Vec<KvEvent> {
        lock(&self.tree).dump(worker, Some(tier))
    }
}

fn lock(tree: &Mutex<Tree>) -> MutexGuard<'_, Tree> {
    tree.lock().expect("nothing that holds the lock panics")
}
