//! Regains what a fence made unknown.
//!
//! Engines never publish the blocks again that a request hits, so after a fence the hottest prefixes would stay unknown: new
//! blocks arrive as orphans, below a parent that the index has forgotten. But an orphan proves more than it says: its request
//! is running, so the *whole chain above it is held now*. What is missing is where the parent lies, and there are three ways to
//! learn it, asked in this order:
//!
//! 1. **Memory.** A name's place is a fact about content, not about residency: it outlives a fence. A lineage remembers, for each
//!    name, its parent and its block. The rank's own names of the same life count at once, those of another rank (or an earlier
//!    life) once the two have named eight blocks alike and none otherwise.
//! 2. **Requests.** The orphan continues a prompt that this router sent to the rank: its blocks are in the prompt, and the parent is the
//!    prompt up to there. The names of the blocks above the parent stay unknown, so they get names of ours, held as long as the
//!    parent is: engines evict a chain from its end.
//! 3. **Answers.** `cached_tokens` of a finished request says how much of its prompt was held; [`Rebuild::answered`] gives back what
//!    to predict.
//!
//! One for each partition, in front of the index: events go through [`Rebuild::event`] in the order of their worker. Only ranks that
//! were fenced and not whole since cost more than a note of their names.

mod lineage;

use kvlane_index::{BlockHash, EngineHash, Group, GroupKind, KvEvent, StoredBlock, Tier, Worker};
use lineage::{Lineage, Source};
use std::collections::{HashMap, VecDeque};

/// Blocks of requests remembered for each learning rank.
const REQUEST_BLOCKS_MAX: usize = 65_536;

/// Names that a learning rank may hold; with more it stops to learn.
const KNOWN_MAX: usize = 4 << 20;

/// Blocks of one chain that are regained at most; a longer one stays an orphan.
const CHAIN_MAX: usize = 65_536;

/// Copies of one name that are counted, as in the index.
const COPIES_MAX: u8 = kvlane_index::MAX_COPIES;

/// Blocks regained, by how their place was learnt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Regained {
    /// From what the same life of the rank had said before.
    pub memory: u64,
    /// From what a rank that hashes alike said.
    pub alike: u64,
    /// From a request of this router.
    pub request: u64,
    /// From `cached_tokens`, as predictions.
    pub answer: u64,
}

/// Stands in front of the index of one partition. See the module's description.
#[derive(Debug)]
pub struct Rebuild {
    lineage: Lineage,
    ranks: HashMap<Worker, Rank>,
    regained: Regained,
}

#[derive(Debug)]
struct Rank {
    source: Source,
    /// Set while part of what the rank holds may be unknown.
    learning: Option<Learning>,
}

#[derive(Debug, Default)]
struct Learning {
    /// Names at known places, with their copies.
    known: HashMap<EngineHash, u8>,
    /// Prompts that were sent to the rank, the latest last.
    requests: VecDeque<Vec<BlockHash>>,
    request_blocks: usize,
    /// For a parent that a request placed: our names of the blocks above it.
    stand_ins: HashMap<EngineHash, Vec<EngineHash>>,
}

impl Rebuild {
    /// Remembers the lineage of at least `names` blocks (about 50 bytes each).
    pub fn new(names: usize) -> Self {
        Self { lineage: Lineage::new(names), ranks: HashMap::new(), regained: Regained::default() }
    }

    /// A fence: the index forgets `worker`. `restarted` says that its names may mean something else from now on.
    pub fn reset(&mut self, worker: Worker, restarted: bool) {
        let source = match self.ranks.get(&worker) {
            Some(rank) if !restarted => rank.source,
            _ => self.lineage.source(),
        };
        self.ranks.insert(worker, Rank { source, learning: Some(Learning::default()) });
    }

    /// The worker is gone for good.
    pub fn forget(&mut self, worker: Worker) {
        self.ranks.remove(&worker);
    }

    /// A prompt of this router is on its way to `worker`.
    pub fn request(&mut self, worker: Worker, blocks: &[BlockHash]) {
        let Some(learning) = self.ranks.get_mut(&worker).and_then(|rank| rank.learning.as_mut()) else {
            return;
        };
        if blocks.len() > REQUEST_BLOCKS_MAX {
            return;
        }
        learning.request_blocks += blocks.len();
        learning.requests.push_back(blocks.to_vec());
        while learning.request_blocks > REQUEST_BLOCKS_MAX {
            let Some(oldest) = learning.requests.pop_front() else { break };
            learning.request_blocks -= oldest.len();
        }
    }

    /// The engine has said that `cached` leading blocks of a prompt were held, where the index said `claimed`: what to predict,
    /// if that is more than the index knew of a rank that is being learnt.
    pub fn answered<'a>(
        &mut self,
        worker: Worker,
        blocks: &'a [BlockHash],
        cached: usize,
        claimed: usize,
    ) -> Option<&'a [BlockHash]> {
        let learning = self.ranks.get(&worker)?.learning.is_some();
        let held = blocks.get(..cached).filter(|_| learning && cached > claimed)?;
        self.regained.answer += (cached - claimed) as u64;
        Some(held)
    }

    /// What was regained since the start.
    pub fn regained(&self) -> Regained {
        self.regained
    }

    /// Takes an event of `worker` and appends what the index is to apply, in order: mostly the event alone.
    pub fn event(&mut self, worker: Worker, event: KvEvent, out: &mut Vec<KvEvent>) {
        let lineage = &mut self.lineage;
        let rank =
            self.ranks.entry(worker).or_insert_with(|| Rank { source: lineage.source(), learning: None });
        match &event {
            KvEvent::Stored { tier, group, parent, blocks } => {
                self.lineage.learn(rank.source, *parent, blocks);
                if *tier == Tier::Device && group.kind == GroupKind::Full {
                    if let (Some(learning), Some(parent)) = (&mut rank.learning, parent)
                        && !learning.known.contains_key(parent)
                    {
                        let regain = Regain { source: rank.source, group: *group, parent: *parent, blocks };
                        regain.run(&self.lineage, learning, &mut self.regained, out);
                    }
                    rank.note_stored(*parent, blocks);
                }
                out.push(event);
            }
            KvEvent::Removed { tier: Tier::Device, group, hashes } => {
                let stand_ins = rank.note_removed(hashes);
                let removed = KvEvent::Removed { tier: Tier::Device, group: *group, hashes: stand_ins };
                out.push(event);
                if !matches!(&removed, KvEvent::Removed { hashes, .. } if hashes.is_empty()) {
                    out.push(removed);
                }
            }
            KvEvent::Cleared { tier: None } => {
                // From here on everything is known.
                rank.learning = None;
                out.push(event);
            }
            KvEvent::Removed { .. } | KvEvent::StoredByHash { .. } | KvEvent::Cleared { .. } => {
                out.push(event);
            }
        }
    }
}

impl Rank {
    fn note_stored(&mut self, parent: Option<EngineHash>, blocks: &[StoredBlock]) {
        let Some(learning) = &mut self.learning else { return };
        if parent.is_some_and(|parent| !learning.known.contains_key(&parent)) {
            return;
        }
        for block in blocks {
            learning.hold(block.engine);
        }
        if learning.known.len() > KNOWN_MAX {
            self.learning = None;
        }
    }

    /// Names of ours that stood in for the blocks above a name that is gone.
    fn note_removed(&mut self, hashes: &[EngineHash]) -> Vec<EngineHash> {
        let Some(learning) = &mut self.learning else { return Vec::new() };
        let mut gone = Vec::new();
        for name in hashes {
            let Some(copies) = learning.known.get_mut(name) else { continue };
            *copies -= 1;
            if *copies == 0 {
                learning.known.remove(name);
                gone.extend(learning.stand_ins.remove(name).unwrap_or_default());
            }
        }
        gone
    }
}

impl Learning {
    fn hold(&mut self, name: EngineHash) {
        let copies = self.known.entry(name).or_default();
        *copies = (*copies + 1).min(COPIES_MAX);
    }
}

/// An orphan: blocks that were stored below a parent at no known place.
struct Regain<'a> {
    source: Source,
    group: Group,
    parent: EngineHash,
    blocks: &'a [StoredBlock],
}

impl Regain<'_> {
    fn run(
        self,
        lineage: &Lineage,
        learning: &mut Learning,
        regained: &mut Regained,
        out: &mut Vec<KvEvent>,
    ) {
        if let Some((anchor, chain, own)) = self.by_lineage(lineage, learning) {
            *(if own { &mut regained.memory } else { &mut regained.alike }) += chain.len() as u64;
            for block in &chain {
                learning.hold(block.engine);
            }
            out.push(KvEvent::Stored {
                tier: Tier::Device,
                group: self.group,
                parent: anchor,
                blocks: chain,
            });
        } else if let Some(above) = self.by_requests(&learning.requests) {
            let chain = self.stand_ins(above);
            regained.request += chain.len() as u64;
            learning.hold(self.parent);
            let names = chain[..chain.len() - 1].iter().map(|block| block.engine).collect();
            learning.stand_ins.insert(self.parent, names);
            out.push(KvEvent::Stored { tier: Tier::Device, group: self.group, parent: None, blocks: chain });
        }
    }

    /// The chain from the root (or from a name that is held) down to the parent, and whether all of it is this life's.
    fn by_lineage(
        &self,
        lineage: &Lineage,
        learning: &Learning,
    ) -> Option<(Option<EngineHash>, Vec<StoredBlock>, bool)> {
        let (mut chain, mut own) = (Vec::new(), true);
        let mut name = self.parent;
        loop {
            let found = lineage.look(self.source, name)?;
            own &= found.own;
            chain.push(StoredBlock { engine: name, block: found.block });
            match found.parent {
                Some(parent) if !learning.known.contains_key(&parent) => name = parent,
                anchor => {
                    chain.reverse();
                    return Some((anchor, chain, own));
                }
            }
            if chain.len() == CHAIN_MAX {
                return None;
            }
        }
    }

    /// The blocks above the orphan, if this router's requests agree on them.
    fn by_requests<'r>(&self, requests: &'r VecDeque<Vec<BlockHash>>) -> Option<&'r [BlockHash]> {
        let first = self.blocks.first()?.block;
        let mut found: Option<&[BlockHash]> = None;
        for prompt in requests {
            for at in (1..prompt.len()).filter(|&at| prompt[at] == first) {
                let continues =
                    prompt[at..].iter().zip(self.blocks).all(|(prompt, stored)| *prompt == stored.block);
                if !continues {
                    continue;
                }
                if found.is_some_and(|other| other != &prompt[..at]) {
                    // The same text at two places: no telling which.
                    return None;
                }
                found = Some(&prompt[..at]);
            }
        }
        found
    }

    /// `above` with the parent's name at its end and names of ours before it.
    fn stand_ins(&self, above: &[BlockHash]) -> Vec<StoredBlock> {
        let mut name = self.parent.0 ^ 0x7374_616e_642d_696e;
        let mut chain: Vec<StoredBlock> = above
            .iter()
            .map(|&block| {
                name = xxhash_rust::xxh3::xxh3_64_with_seed(&block.0.to_le_bytes(), name);
                StoredBlock { engine: EngineHash(name), block }
            })
            .collect();
        if let Some(last) = chain.last_mut() {
            last.engine = self.parent;
        }
        chain
    }
}

#[cfg(test)]
mod tests;
