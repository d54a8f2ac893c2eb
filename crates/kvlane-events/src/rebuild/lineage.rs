//! Where each name lies: its parent and its block, whoever said so.
//!
//! Names of two sources (a rank in one life) may be compared only if the sources hash alike. Most do: vLLM derives its names from
//! the content alone since 0.29, SGLang since 0.5.7. Others mix in a seed of the process, or number their blocks; so it
//! is proven, for each pair, by names that both gave to the same block below the same parent, and disproven by one that they
//! gave to different ones.
//!
//! Bounded by two generations: when the young one is full it becomes the old one, and what is not used again is dropped with it.

use kvlane_index::{BlockHash, EngineHash, StoredBlock};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// So many names must agree before two sources are taken to hash alike.
pub(super) const ALIKE_AFTER: u32 = 8;

/// Pairs of sources that are compared; further ones count as unlike.
const PAIRS_MAX: usize = 65_536;

/// Hashes one 64-bit hash: names and blocks are spread already, but engines may number their blocks, and a map looks at both ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spreader(u64);

impl Hasher for Spreader {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let z = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = z ^ (z >> 32);
    }
}

/// Builds [`Spreader`]s.
pub(super) type Spread = BuildHasherDefault<Spreader>;

/// A rank in one life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Source(u32);

#[derive(Clone, Copy, Debug)]
struct Entry {
    source: Source,
    parent: Option<EngineHash>,
    block: BlockHash,
}

/// What is known about a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) parent: Option<EngineHash>,
    pub(super) block: BlockHash,
    /// The asking source said so itself.
    pub(super) own: bool,
}

#[derive(Clone, Copy, Debug)]
enum Likeness {
    Agreed(u32),
    Unlike,
}

#[derive(Debug)]
pub(super) struct Lineage {
    generation_max: usize,
    young: HashMap<EngineHash, Entry, Spread>,
    old: HashMap<EngineHash, Entry, Spread>,
    pairs: HashMap<(Source, Source), Likeness>,
    /// Sources whose names do not tell a place (SGLang before 0.5.7).
    unchained: HashSet<Source>,
    sources: u32,
}

impl Lineage {
    pub(super) fn new(names: usize) -> Self {
        Self {
            generation_max: names.max(1),
            young: HashMap::default(),
            old: HashMap::default(),
            pairs: HashMap::new(),
            unchained: HashSet::new(),
            sources: 0,
        }
    }

    /// A new source.
    pub(super) fn source(&mut self) -> Source {
        self.sources = self.sources.wrapping_add(1);
        Source(self.sources)
    }

    /// Notes a stored chain.
    pub(super) fn learn(&mut self, source: Source, parent: Option<EngineHash>, blocks: &[StoredBlock]) {
        let mut above = parent;
        for &StoredBlock { engine, block } in blocks {
            let new = Entry { source, parent: above, block };
            above = Some(engine);
            let known = self.young.get(&engine).or_else(|| self.old.get(&engine)).copied();
            if let Some(known) = known {
                let same = known.parent == new.parent && known.block == new.block;
                self.compare(known.source, source, same);
                if same && self.young.contains_key(&engine) {
                    continue;
                }
            }
            if self.young.len() >= self.generation_max {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(engine, new);
        }
    }

    fn compare(&mut self, one: Source, other: Source, same: bool) {
        if one == other {
            if !same && self.unchained.len() < PAIRS_MAX {
                self.unchained.insert(one);
            }
            return;
        }
        let pair = (one.min(other), one.max(other));
        if self.pairs.len() >= PAIRS_MAX && !self.pairs.contains_key(&pair) {
            return;
        }
        let likeness = self.pairs.entry(pair).or_insert(Likeness::Agreed(0));
        *likeness = match *likeness {
            Likeness::Agreed(times) if same => Likeness::Agreed(times.saturating_add(1)),
            _ => Likeness::Unlike,
        };
    }

    fn alike(&self, one: Source, other: Source) -> bool {
        let pair = (one.min(other), one.max(other));
        one == other
            || matches!(self.pairs.get(&pair), Some(Likeness::Agreed(times)) if *times >= ALIKE_AFTER)
    }

    /// What `asking` may believe about `name`.
    pub(super) fn look(&self, asking: Source, name: EngineHash) -> Option<Found> {
        let Entry { source, parent, block } = *self.young.get(&name).or_else(|| self.old.get(&name))?;
        let believed = self.alike(asking, source)
            && !self.unchained.contains(&asking)
            && !self.unchained.contains(&source);
        believed.then_some(Found { parent, block, own: source == asking })
    }
}

#[cfg(test)]
impl Lineage {
    pub(super) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}
