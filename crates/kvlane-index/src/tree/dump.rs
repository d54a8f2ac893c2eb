//! What a rank holds, as events that give an empty index the same.

use super::Tree;
use super::ranks::Map;
use super::shared::NONE;
use crate::{EngineHash, Group, KvEvent, StoredBlock, Worker};

/// Blocks in one event of a dump.
const MAX_EVENT_BLOCKS: usize = 256;

/// One name at one place.
#[derive(Clone, Copy)]
struct Entry {
    name: u64,
    block: u32,
    copies: u8,
}

impl Tree {
    fn held_under(&self, rank: u32, class: super::shared::Class) -> Vec<Entry> {
        let state = self.rank(rank);
        let mut runs = state.runs.clone();
        runs.sort_unstable();
        runs.dedup();
        runs.retain(|&run| self.len(run) > 0);
        runs.sort_by_key(|&run| (self.metas[run as usize].depth, self.word(run, 1)));
        let alias_at: Map<u32, u64> = state.aliases.iter().map(|(name, block)| (*block, *name)).collect();
        let mut out = Vec::new();
        for run in runs {
            let cover = self.cover(run, rank, class);
            for at in (0..self.len(run)).filter(|&at| self.covers(cover, at)) {
                let block = self.block_at(run, at);
                match state.twins.get(&block) {
                    Some(twins) => {
                        for twin in twins {
                            let copies = twin.copies.iter().find(|(c, _)| *c == class).map_or(0, |(_, n)| *n);
                            if copies > 0 {
                                out.push(Entry { name: twin.name, block, copies });
                            }
                        }
                    }
                    None => {
                        let name =
                            if state.is_aliased(block) { alias_at[&block] } else { self.engines.get(block) };
                        let copies = 1 + state.copies.get(&(class.0, block)).copied().unwrap_or(0);
                        out.push(Entry { name, block, copies });
                    }
                }
            }
        }
        out
    }

    /// The block before; `NONE` at the root.
    fn before(&self, block: u32) -> u32 {
        match self.locate(block) {
            (run, 0) => self.metas[run as usize].parent,
            (run, at) => self.block_at(run, at - 1),
        }
    }

    pub(crate) fn dump(&self, worker: Worker) -> Vec<KvEvent> {
        let Some(&rank) = self.by_worker.get(&worker) else { return Vec::new() };
        let mut events = Vec::new();
        for held in self.held(self.rank(rank)) {
            events.push(KvEvent::StoredByHash { tier: held.tier, group: held.group, hashes: Vec::new() });
        }
        // Engine hash by which a block can be named as a parent.
        let mut handles: Map<u32, u64> = Map::default();
        let mut fillers = Vec::new();
        let mut next_filler = 0u64;
        for shown in &self.rank(rank).classes {
            let (tier, class) = (shown.class.tier(), shown.class);
            let group = Group { id: self.groups[class.group_index()], kind: shown.kind };
            let entries = self.held_under(rank, class);
            // The last event, the block that it ends with.
            let mut open: Option<(Vec<StoredBlock>, Option<EngineHash>, u32)> = None;
            let flush = |open: &mut Option<(Vec<StoredBlock>, Option<EngineHash>, u32)>,
                         events: &mut Vec<KvEvent>| {
                if let Some((blocks, parent, _)) = open.take() {
                    events.push(KvEvent::Stored { tier, group, parent, blocks });
                }
            };
            for Entry { name, block, copies } in entries {
                let before = self.before(block);
                let stored = StoredBlock { engine: EngineHash(name), block: self.block_hash(block) };
                // A chain goes on only through the name that its last event block bears.
                match &mut open {
                    Some((blocks, _, last))
                        if *last == before && copies == 1 && blocks.len() < MAX_EVENT_BLOCKS =>
                    {
                        blocks.push(stored);
                        *last = block;
                        handles.entry(block).or_insert(name);
                        continue;
                    }
                    _ => flush(&mut open, &mut events),
                }
                if before != NONE && !handles.contains_key(&before) {
                    // Nothing of the way here is held: fill it from the last block that has a handle.
                    let mut way = Vec::new();
                    let mut top = before;
                    while top != NONE && !handles.contains_key(&top) {
                        way.push(top);
                        top = self.before(top);
                    }
                    let parent = handles.get(&top).map(|h| EngineHash(*h));
                    let mut blocks = Vec::new();
                    for &empty in way.iter().rev() {
                        while self.known(rank, next_filler) != super::store::Known::No {
                            next_filler += 1;
                        }
                        blocks.push(StoredBlock {
                            engine: EngineHash(next_filler),
                            block: self.block_hash(empty),
                        });
                        handles.insert(empty, next_filler);
                        next_filler += 1;
                    }
                    let hashes = blocks.iter().map(|b| b.engine).collect();
                    fillers.push(KvEvent::Removed { tier, group: group.id, hashes });
                    events.push(KvEvent::Stored { tier, group, parent, blocks });
                }
                let parent = handles.get(&before).map(|h| EngineHash(*h));
                for _ in 1..copies {
                    events.push(KvEvent::Stored { tier, group, parent, blocks: vec![stored] });
                }
                handles.entry(block).or_insert(name);
                open = Some((vec![stored], parent, block));
            }
            flush(&mut open, &mut events);
        }
        events.append(&mut fillers);
        events
    }
}
