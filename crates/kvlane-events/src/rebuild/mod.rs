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
//! 2. **Requests.** The orphan continues a prompt that this router sent to the rank: its blocks are the end of the prompt, and the parent
//!    is the prompt up to there. The names of the blocks above the parent stay unknown, so they get names of ours, held as long as
//!    the parent is: engines evict a chain from its end.
//! 3. **Answers.** `cached_tokens` of a finished request says how much of its prompt was held; [`Rebuild::answered`] says whether to
//!    predict it.
//!
//! One for each partition, in front of the index: events go through [`Rebuild::event`] in the order of their worker, fences and the
//! news that a rank is whole between them. Only ranks that were fenced and are not whole since cost more than a note of their names.
//!
//! The names of ours assume that a chain goes from its end, as vLLM's free queue and SGLang's tree have it: where an engine takes a block
//! out of the middle, they claim it until its child goes too, or until `cached_tokens` gives them away.

mod lineage;
mod requests;

use kvlane_index::{BlockHash, EngineHash, Group, GroupKind, KvEvent, StoredBlock, Tier, Worker};
use lineage::{Lineage, Source, Spread};
use requests::Requests;
use std::collections::HashMap;
use std::ops::AddAssign;
use std::sync::Arc;

/// Names that a learning rank may hold; further ones are not followed.
const HELD_MAX: usize = 4 << 20;

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

impl AddAssign for Regained {
    fn add_assign(&mut self, other: Self) {
        let Self { memory, alike, request, answer } = other;
        self.memory += memory;
        self.alike += alike;
        self.request += request;
        self.answer += answer;
    }
}

/// Stands in front of the index of one partition. See the module's description.
#[derive(Debug)]
pub struct Rebuild {
    lineage: Lineage,
    ranks: HashMap<Worker, Rank>,
    /// Ranks that are being learnt.
    learning: usize,
}

#[derive(Debug)]
struct Rank {
    source: Source,
    /// Set while part of what the rank holds may be unknown.
    learning: Option<Learning>,
}

/// A name that the index holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    copies: u8,
    /// Its place is known; if not, it is an orphan.
    placed: bool,
}

#[derive(Debug, Default)]
struct Learning {
    /// The names that the index holds.
    held: HashMap<EngineHash, Held, Spread>,
    /// Prompts that were sent to the rank.
    requests: Requests,
    /// For a parent that a request placed: our names of the blocks above it.
    stand_ins: HashMap<EngineHash, Vec<EngineHash>>,
}

impl Rebuild {
    /// Remembers the lineage of at least `names` blocks, and of at most twice as many (about 60 bytes each).
    pub fn new(names: usize) -> Self {
        Self { lineage: Lineage::new(names), ranks: HashMap::new(), learning: 0 }
    }

    /// A fence: the index forgets `worker`. `restarted` says that its names may mean something else from now on.
    pub fn fence(&mut self, worker: Worker, restarted: bool) {
        let source = match self.ranks.get(&worker) {
            Some(rank) if !restarted => rank.source,
            _ => self.lineage.source(),
        };
        self.forget(worker);
        self.ranks.insert(worker, Rank { source, learning: Some(Learning::default()) });
        self.learning += 1;
    }

    /// All that the worker holds is known: there is nothing to regain until the next fence.
    pub fn complete(&mut self, worker: Worker) {
        if let Some(rank) = self.ranks.get_mut(&worker)
            && rank.learning.take().is_some()
        {
            self.learning -= 1;
        }
    }

    /// The worker is gone for good.
    pub fn forget(&mut self, worker: Worker) {
        self.complete(worker);
        self.ranks.remove(&worker);
    }

    /// Whether any rank is being learnt: if not, requests and answers tell nothing.
    pub fn is_learning(&self) -> bool {
        self.learning > 0
    }

    /// A prompt of this router is on its way to `worker`.
    pub fn request(&mut self, worker: Worker, blocks: &Arc<[BlockHash]>) {
        if let Some(learning) = self.ranks.get_mut(&worker).and_then(|rank| rank.learning.as_mut()) {
            learning.requests.push(blocks);
        }
    }

    /// The engine has said that `cached` leading blocks of a prompt were held, where the index said `claimed`: whether to predict
    /// them, and what is regained by that.
    pub fn answered(&self, worker: Worker, cached: usize, claimed: usize) -> Option<Regained> {
        let learning = self.ranks.get(&worker)?.learning.is_some();
        let more = cached.checked_sub(claimed).filter(|more| learning && *more > 0)?;
        Some(Regained { answer: more as u64, ..Regained::default() })
    }

    /// Takes an event of `worker` and appends what the index is to apply, in order: mostly the event alone.
    pub fn event(&mut self, worker: Worker, event: KvEvent, out: &mut Vec<KvEvent>) -> Regained {
        let mut regained = Regained::default();
        let lineage = &mut self.lineage;
        let rank =
            self.ranks.entry(worker).or_insert_with(|| Rank { source: lineage.source(), learning: None });
        match &event {
            KvEvent::Stored { tier, group, parent, blocks } => {
                self.lineage.learn(rank.source, *parent, blocks);
                if *tier == Tier::Device && group.kind == GroupKind::Full {
                    if let (Some(learning), Some(parent)) = (&mut rank.learning, parent)
                        && !learning.is_placed(*parent)
                    {
                        let regain = Regain { source: rank.source, group: *group, parent: *parent, blocks };
                        regained = regain.run(&self.lineage, learning, out);
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
                self.complete(worker);
                out.push(event);
            }
            KvEvent::Removed { .. } | KvEvent::StoredByHash { .. } | KvEvent::Cleared { .. } => {
                out.push(event);
            }
        }
        regained
    }
}

impl Rank {
    fn note_stored(&mut self, parent: Option<EngineHash>, blocks: &[StoredBlock]) {
        let Some(learning) = &mut self.learning else { return };
        let placed = parent.is_none_or(|parent| learning.is_placed(parent));
        if learning.held.len() + blocks.len() > HELD_MAX {
            // As if they were not there: later ones below them are orphans to it.
            return;
        }
        for block in blocks {
            learning.hold(block.engine, placed);
        }
    }

    /// Names of ours that stood in for the blocks above a name that is gone.
    fn note_removed(&mut self, hashes: &[EngineHash]) -> Vec<EngineHash> {
        let Some(learning) = &mut self.learning else { return Vec::new() };
        let mut gone = Vec::new();
        for name in hashes {
            let Some(held) = learning.held.get_mut(name) else { continue };
            held.copies -= 1;
            if held.copies == 0 {
                learning.held.remove(name);
                gone.extend(learning.stand_ins.remove(name).unwrap_or_default());
            }
        }
        gone
    }
}

impl Learning {
    fn is_placed(&self, name: EngineHash) -> bool {
        self.held.get(&name).is_some_and(|held| held.placed)
    }

    /// One more copy of a name. At least as many are counted as in the index, where an orphan whose place was found keeps its copies and one
    /// that was stored elsewhere does not: a name that seems to be held is not stored again.
    fn hold(&mut self, name: EngineHash, placed: bool) {
        let held = self.held.entry(name).or_insert(Held { copies: 0, placed });
        held.placed |= placed;
        held.copies = (held.copies + 1).min(COPIES_MAX);
    }

    /// Stores what is not held of a chain below `parent`; what is held there as an orphan finds its place by that.
    fn place(
        &mut self,
        group: Group,
        mut parent: Option<EngineHash>,
        chain: &[StoredBlock],
        out: &mut Vec<KvEvent>,
    ) -> u64 {
        let mut stored = 0;
        let is_held = |block: &StoredBlock| self.held.contains_key(&block.engine);
        for run in chain.chunk_by(|a, b| is_held(a) == is_held(b)) {
            if !is_held(&run[0]) {
                stored += run.len() as u64;
                out.push(KvEvent::Stored { tier: Tier::Device, group, parent, blocks: run.to_vec() });
            }
            parent = run.last().map(|block| block.engine);
        }
        for block in chain {
            match self.held.get_mut(&block.engine) {
                Some(held) => held.placed = true,
                None => self.hold(block.engine, true),
            }
        }
        stored
    }
}

/// An orphan: blocks that were stored below a parent at no known place.
struct Regain<'a> {
    source: Source,
    group: Group,
    parent: EngineHash,
    blocks: &'a [StoredBlock],
}

/// What remembering the names above an orphan came to: the chain down to its parent, and what is above that.
struct Climb {
    chain: Vec<StoredBlock>,
    /// All of the chain is this life's.
    own: bool,
    above: Above,
}

enum Above {
    /// Nothing (the root of a prompt), or a name at a known place.
    Placed(Option<EngineHash>),
    /// A name that nobody remembers.
    Unknown(EngineHash),
}

impl Regain<'_> {
    fn run(self, lineage: &Lineage, learning: &mut Learning, out: &mut Vec<KvEvent>) -> Regained {
        let mut regained = Regained::default();
        let Some(Climb { chain, own, above }) = self.climb(lineage, learning) else { return regained };
        match above {
            Above::Placed(parent) => {
                let stored = learning.place(self.group, parent, &chain, out);
                *(if own { &mut regained.memory } else { &mut regained.alike }) += stored;
            }
            Above::Unknown(name) if !learning.held.contains_key(&name) => {
                let contents: Vec<BlockHash> =
                    chain.iter().chain(self.blocks).map(|stored| stored.block).collect();
                let Some(above) = learning.requests.above(&contents) else { return regained };
                let stand_ins = stand_ins(name, above);
                let names = stand_ins.split_last().map_or(&[][..], |(_, above)| above);
                let names = names.iter().map(|block| block.engine).collect();
                regained.request += learning.place(self.group, None, &stand_ins, out);
                learning.stand_ins.insert(name, names);
                regained.request += learning.place(self.group, Some(name), &chain, out);
            }
            Above::Unknown(_) => {}
        }
        regained
    }

    /// Remembers the way up from the orphan's parent; `None` if it is too long.
    fn climb(&self, lineage: &Lineage, learning: &Learning) -> Option<Climb> {
        let (mut chain, mut own) = (Vec::new(), true);
        let mut name = self.parent;
        let above = loop {
            let Some(found) = lineage.look(self.source, name) else { break Above::Unknown(name) };
            own &= found.own;
            chain.push(StoredBlock { engine: name, block: found.block });
            match found.parent {
                Some(parent) if !learning.is_placed(parent) => name = parent,
                placed => break Above::Placed(placed),
            }
            if chain.len() == CHAIN_MAX {
                return None;
            }
        };
        chain.reverse();
        Some(Climb { chain, own, above })
    }
}

/// The blocks of `above` under names of ours, except that the last is `parent`.
fn stand_ins(parent: EngineHash, above: &[BlockHash]) -> Vec<StoredBlock> {
    let mut name = parent.0 ^ 0x7374_616e_642d_696e;
    let mut chain: Vec<StoredBlock> = above
        .iter()
        .map(|&block| {
            name = xxhash_rust::xxh3::xxh3_64_with_seed(&block.0.to_le_bytes(), name);
            StoredBlock { engine: EngineHash(name), block }
        })
        .collect();
    if let Some(last) = chain.last_mut() {
        last.engine = parent;
    }
    chain
}

#[cfg(test)]
mod tests;
