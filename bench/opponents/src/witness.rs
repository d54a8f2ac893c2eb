//! The right answer at a size that the naive oracle cannot hold.
//!
//! `kvlane_index::reference` keeps a path of block hashes for each engine hash; a million of them at depth 8,192 is out of
//! reach. This model interns each prefix as a node under its parent's node, so it needs no prefix hash either
//! and shares nothing with any contender. It knows one tier, one full-attention group and no orphans: all that the workloads
//! use. A test compares it with the oracle on every regime of `exactness`.

use kvlane_index::{BlockHash, EngineHash, KvEvent, Worker};
use rustc_hash::FxHashMap;

use crate::contender::{Answer, Event};

/// Copies that the oracle counts.
const MAX_COPIES: u8 = kvlane_index::MAX_COPIES;

const ROOT: u32 = 0;

/// Who holds a prefix, sorted by worker: slot and the number of engine hashes it holds it under.
type Holders = Vec<(u16, u16)>;

/// An exact index of one tier, in the plainest fast code.
pub struct Witness {
    slots: FxHashMap<Worker, u16>,
    workers: Vec<Worker>,
    children: FxHashMap<(u32, BlockHash), u32>,
    holders: Vec<Holders>,
    /// Of each engine hash that a worker holds: its node and its copies.
    names: Vec<FxHashMap<EngineHash, (u32, u8)>>,
}

impl Default for Witness {
    fn default() -> Self {
        Self {
            slots: FxHashMap::default(),
            workers: Vec::new(),
            children: FxHashMap::default(),
            holders: vec![Holders::new()],
            names: Vec::new(),
        }
    }
}

impl Witness {
    fn slot(&mut self, worker: Worker) -> u16 {
        let next = self.workers.len() as u16;
        *self.slots.entry(worker).or_insert_with(|| {
            self.workers.push(worker);
            self.names.push(FxHashMap::default());
            next
        })
    }

    fn hold(&mut self, node: u32, slot: u16) {
        let holders = &mut self.holders[node as usize];
        match holders.binary_search_by_key(&slot, |h| h.0) {
            Ok(at) => holders[at].1 += 1,
            Err(at) => holders.insert(at, (slot, 1)),
        }
    }

    fn leave(&mut self, node: u32, slot: u16) {
        let holders = &mut self.holders[node as usize];
        let at = holders.binary_search_by_key(&slot, |h| h.0).expect("a name holds its node");
        holders[at].1 -= 1;
        if holders[at].1 == 0 {
            holders.remove(at);
        }
    }

    /// Applies one event.
    pub fn apply(&mut self, (worker, event): &Event) {
        let slot = self.slot(*worker);
        match event {
            KvEvent::Stored { parent, blocks, .. } => {
                let mut node = match parent {
                    None => ROOT,
                    Some(parent) => {
                        self.names[slot as usize].get(parent).expect("workloads have no orphans").0
                    }
                };
                for stored in blocks {
                    let fresh = self.holders.len() as u32;
                    node = *self.children.entry((node, stored.block)).or_insert(fresh);
                    if node == fresh {
                        self.holders.push(Holders::new());
                    }
                    let known = self.names[slot as usize].get(&stored.engine).copied();
                    let copies = match known {
                        Some((old, copies)) if old == node => (copies + 1).min(MAX_COPIES),
                        Some((old, _)) => {
                            self.leave(old, slot);
                            self.hold(node, slot);
                            1
                        }
                        None => {
                            self.hold(node, slot);
                            1
                        }
                    };
                    self.names[slot as usize].insert(stored.engine, (node, copies));
                }
            }
            KvEvent::Removed { hashes, .. } => {
                for name in hashes {
                    let Some((node, copies)) = self.names[slot as usize].get_mut(name) else { continue };
                    *copies -= 1;
                    if *copies == 0 {
                        let node = *node;
                        self.names[slot as usize].remove(name);
                        self.leave(node, slot);
                    }
                }
            }
            KvEvent::Cleared { .. } => {
                for (_, (node, _)) in std::mem::take(&mut self.names[slot as usize]) {
                    self.leave(node, slot);
                }
            }
            KvEvent::StoredByHash { .. } => unreachable!("no workload stores by name alone"),
        }
    }

    /// Leading blocks of `prompt` by worker.
    pub fn answer(&self, prompt: &[BlockHash]) -> Answer {
        let mut answer = Answer::new();
        let mut node = ROOT;
        let mut active: Option<Vec<u16>> = None;
        let mut depth = 0;
        for block in prompt {
            let Some(&child) = self.children.get(&(node, *block)) else { break };
            let holders = &self.holders[child as usize];
            active = Some(match active {
                None => holders.iter().map(|h| h.0).collect(),
                Some(before) => {
                    let mut held = holders.iter().map(|h| h.0).peekable();
                    let mut still = Vec::with_capacity(before.len().min(holders.len()));
                    for slot in before {
                        while held.peek().is_some_and(|h| *h < slot) {
                            held.next();
                        }
                        if held.peek() == Some(&slot) {
                            still.push(slot);
                        } else {
                            answer.insert(self.workers[slot as usize], depth);
                        }
                    }
                    still
                }
            });
            depth += 1;
            node = child;
            if active.as_ref().is_some_and(Vec::is_empty) {
                break;
            }
        }
        let last = active.unwrap_or_default().into_iter();
        answer.extend(last.map(|slot| (self.workers[slot as usize], depth)));
        answer
    }
}
