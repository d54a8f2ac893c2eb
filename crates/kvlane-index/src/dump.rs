//! What a rank holds, as events that give an empty index the same: one form for one content.
//!
//! The same content gives the same events, whatever structure, prefix key or history it has: so dumps can be compared, and snapshots are
//! equal if what is in them is.
//!
//! # The form
//!
//! First each (tier, group) that the rank has shown, sorted, in an event that stores nothing. Then, (tier, group) by (tier, group), what is held
//! there, in the order of a walk through the prefix tree, smaller block hashes first: in chains as long as they go on, at most
//! [`MAX_EVENT_BLOCKS`] blocks each, under the smallest engine hash of each place; then the other engine hashes and the
//! further copies, one an event. A parent is named by the smallest engine hash under which the first (tier, group) that has the place
//! holds it. Where the way to a block is not held yet, *fillers* are stored: engine hashes that the rank does not use, the
//! smallest numbers first, which are removed again by the last events.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use crate::{BlockHash, EngineHash, Group, KvEvent, StoredBlock, Tier};

/// Blocks in one event of a dump.
pub(crate) const MAX_EVENT_BLOCKS: usize = 256;

/// One engine hash at one place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<P> {
    pub(crate) place: P,
    pub(crate) name: u64,
    pub(crate) copies: u8,
}

/// What is held in one tier and group: in the order of the walk, and at one place by engine hash.
#[derive(Debug)]
pub(crate) struct Section<P> {
    pub(crate) tier: Tier,
    pub(crate) group: Group,
    pub(crate) entries: Vec<Entry<P>>,
}

/// How places hang together; `P` names one.
pub(crate) trait Places {
    type Place: Copy + Eq + Hash;
    /// The place before; `None` at the root.
    fn before(&self, place: Self::Place) -> Option<Self::Place>;
    fn content(&self, place: Self::Place) -> BlockHash;
    /// The smallest engine hash under which the first of the first `sections` that holds a place does.
    fn handle(&self, place: Self::Place, sections: usize) -> Option<u64>;
}

/// A chain that may go on, and the place where it ends.
struct Open<P> {
    parent: Option<EngineHash>,
    blocks: Vec<StoredBlock>,
    last: P,
}

/// The events of a dump.
pub(crate) fn events<T: Places>(places: &T, sections: &[Section<T::Place>]) -> Vec<KvEvent> {
    let mut out: Vec<KvEvent> = sections
        .iter()
        .map(|s| KvEvent::StoredByHash { tier: s.tier, group: s.group, hashes: Vec::new() })
        .collect();
    let mut fillers = Fillers { sections, names: HashMap::new(), used: None, next: 0 };
    let mut removals = Vec::new();
    for (at, Section { tier, group, entries }) in sections.iter().enumerate() {
        let (tier, group) = (*tier, *group);
        let mut open: Option<Open<T::Place>> = None;
        let close = |open: &mut Option<Open<T::Place>>, out: &mut Vec<KvEvent>| {
            if let Some(Open { parent, blocks, .. }) = open.take() {
                out.push(KvEvent::Stored { tier, group, parent, blocks });
            }
        };
        let mut previous = None;
        for entry in entries {
            if previous.replace(entry.place) == Some(entry.place) {
                continue;
            }
            let block = StoredBlock { engine: EngineHash(entry.name), block: places.content(entry.place) };
            let before = places.before(entry.place);
            match &mut open {
                Some(chain) if before == Some(chain.last) && chain.blocks.len() < MAX_EVENT_BLOCKS => {
                    chain.blocks.push(block);
                    chain.last = entry.place;
                    continue;
                }
                _ => close(&mut open, &mut out),
            }
            // The way here that has no name yet, from its end.
            let mut way = Vec::new();
            let mut top = before;
            while let Some(place) = top
                && places.handle(place, at + 1).is_none()
                && !fillers.names.contains_key(&place)
            {
                way.push(place);
                top = places.before(place);
            }
            if !way.is_empty() {
                let parent = fillers.parent(places, top, at + 1);
                let fill = |&place: &T::Place| StoredBlock {
                    engine: EngineHash(fillers.name(place)),
                    block: places.content(place),
                };
                let blocks: Vec<StoredBlock> = way.iter().rev().map(fill).collect();
                let hashes = blocks.iter().map(|b| b.engine).collect();
                removals.push(KvEvent::Removed { tier, group: group.id, hashes });
                out.push(KvEvent::Stored { tier, group, parent, blocks });
            }
            open = Some(Open {
                parent: fillers.parent(places, before, at + 1),
                blocks: vec![block],
                last: entry.place,
            });
        }
        close(&mut open, &mut out);
        let mut previous = None;
        for entry in entries {
            let first = previous.replace(entry.place) != Some(entry.place);
            for _ in u8::from(first)..entry.copies {
                let parent = fillers.parent(places, places.before(entry.place), at + 1);
                let blocks =
                    vec![StoredBlock { engine: EngineHash(entry.name), block: places.content(entry.place) }];
                out.push(KvEvent::Stored { tier, group, parent, blocks });
            }
        }
    }
    out.append(&mut removals);
    out
}

/// Engine hashes for places on the way that are not held.
struct Fillers<'a, T: Places> {
    sections: &'a [Section<T::Place>],
    names: HashMap<T::Place, u64>,
    /// Made when the first filler is needed.
    used: Option<HashSet<u64>>,
    next: u64,
}

impl<T: Places> Fillers<'_, T> {
    /// The engine hash by which a place is named as a parent, of those stored so far.
    fn parent(&self, places: &T, before: Option<T::Place>, sections: usize) -> Option<EngineHash> {
        let place = before?;
        places.handle(place, sections).or_else(|| self.names.get(&place).copied()).map(EngineHash)
    }

    fn name(&mut self, place: T::Place) -> u64 {
        let used = self.used.get_or_insert_with(|| {
            self.sections.iter().flat_map(|s| s.entries.iter().map(|e| e.name)).collect()
        });
        while used.contains(&self.next) {
            self.next += 1;
        }
        let name = self.next;
        self.next += 1;
        self.names.insert(place, name);
        name
    }
}
