//! Follows an engine whose events are drained over HTTP: TensorRT-LLM's buffered path.
//!
//! `POST /kv_cache_events` empties the engine's ring, so there is one reader, nothing can be asked for again, and a gap in the
//! event numbers (the ring overflowed, an answer was lost, or somebody else drained it) is a fence. Numbers count in each attention
//! data-parallel rank, or in the engine if it has one. A number that falls back is a restart. Poll every 5 to 20 ms.
//!
//! * Partial blocks are passed over, and remembered so that their removal is as well.
//! * Layers with several window sizes report each their own blocks; only the largest window counts, since a hit needs it most.
//! * `updated` moves a block between levels; a removal does not say from which, so every level that was used is told.
//!
//! Sans-IO, as [`crate::stream`] is, with the same actions (but never a replay request).

use crate::resolve::Resolver;
use crate::stream::{Action, Counters, Fault, State};
use crate::wire::drain::{DrainEvent, Drained, decode_drain};
use crate::wire::{Batch, DropReason, WireEvent};
use kvlane_index::{BlockSize, EngineHash, Group, GroupId, KvEvent, Tier};
use std::collections::{BTreeMap, HashSet, VecDeque};

/// Names of partial blocks remembered for each rank; the oldest are forgotten, and their removals then count as unknown.
const PARTIAL_MAX: usize = 16_384;

/// Ranks of one engine; events of further ones are dropped.
const RANKS_MAX: usize = 1_024;

/// Something that happened to the polling.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Input<'a> {
    /// An answer's body.
    Body(&'a [u8]),
    /// No answer, or not 200.
    Failed,
    /// The engine's `process_start_time_seconds`, whenever it was read.
    ProcessStart(f64),
    /// What is known of the engine is not to be trusted.
    Relearn,
    /// Time passed.
    Tick,
}

/// The state machine of one drained engine with all its ranks.
#[derive(Clone, Debug)]
pub struct Drain {
    block_size: BlockSize,
    stale_ms: u64,
    ranks: BTreeMap<u32, Rank>,
    process_start_s: Option<f64>,
    /// Since when polling fails.
    failing_since_ms: Option<u64>,
    reached: bool,
}

/// One rank's state.
#[derive(Clone, Debug)]
struct Rank {
    resolver: Resolver,
    next: Option<u64>,
    complete: bool,
    removal_lost: bool,
    epoch: u64,
    window: Option<u64>,
    partial: Partial,
    /// Levels that were used, by [`Tier::ALL`]'s order.
    used: [bool; 4],
    reported: State,
    counters: Counters,
}

#[derive(Clone, Debug, Default)]
struct Partial {
    names: HashSet<EngineHash>,
    order: VecDeque<EngineHash>,
}

impl Partial {
    fn remember(&mut self, name: EngineHash) {
        if self.names.insert(name) {
            self.order.push_back(name);
            if self.order.len() > PARTIAL_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.names.remove(&oldest);
            }
        }
    }
}

impl Drain {
    /// An engine that was not polled yet; what it said is claimed for `stale_ms` after polling begins to fail.
    pub fn new(block_size: BlockSize, stale_ms: u64) -> Self {
        Self {
            block_size,
            stale_ms,
            ranks: BTreeMap::new(),
            process_start_s: None,
            failing_since_ms: None,
            reached: false,
        }
    }

    /// Takes one input and appends what is to be done, with the rank that it is about.
    pub fn handle(&mut self, input: Input<'_>, now_ms: u64, out: &mut Vec<(u32, Action)>) {
        match input {
            Input::Body(body) => {
                self.failing_since_ms = None;
                self.reached = true;
                // An engine without attention data parallelism says nothing about ranks until its first event.
                self.rank(0);
                self.body(body, out);
            }
            Input::Failed => {
                self.failing_since_ms.get_or_insert(now_ms);
            }
            Input::ProcessStart(start_s) => {
                let before = self.process_start_s.replace(start_s);
                if before.is_some_and(|before| before != start_s) {
                    self.relearn(true, out);
                }
            }
            Input::Relearn => self.relearn(false, out),
            Input::Tick => {}
        }
        if self.reached && self.next_deadline_ms().is_some_and(|at| now_ms >= at) {
            self.relearn(false, out);
            self.reached = false;
        }
        let (reached, failing) = (self.reached, self.failing_since_ms.is_some());
        for (&number, rank) in &mut self.ranks {
            let state = rank.state(reached, failing);
            if state != rank.reported {
                rank.reported = state;
                out.push((number, Action::StateChanged(state)));
            }
        }
    }

    /// When to call [`Drain::handle`] with [`Input::Tick`] if nothing else happens before.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.failing_since_ms.filter(|_| self.reached).map(|since| since + self.stale_ms)
    }

    /// How far a rank can be trusted; blind for one that never spoke.
    pub fn state(&self, rank: u32) -> State {
        let failing = self.failing_since_ms.is_some();
        self.ranks.get(&rank).map_or(State::Blind, |rank| rank.state(self.reached, failing))
    }

    /// What a rank has said since the start.
    pub fn counters(&self, rank: u32) -> Counters {
        self.ranks.get(&rank).map_or_else(Counters::default, |rank| rank.counters)
    }

    fn rank(&mut self, number: u32) -> Option<&mut Rank> {
        if self.ranks.len() >= RANKS_MAX && !self.ranks.contains_key(&number) {
            return None;
        }
        Some(self.ranks.entry(number).or_insert_with(|| Rank {
            resolver: Resolver::new(self.block_size),
            next: None,
            complete: false,
            removal_lost: false,
            epoch: 0,
            window: None,
            partial: Partial::default(),
            used: [true, false, false, false],
            reported: State::Blind,
            counters: Counters::default(),
        }))
    }

    fn relearn(&mut self, restarted: bool, out: &mut Vec<(u32, Action)>) {
        for (&number, rank) in &mut self.ranks {
            rank.counters.restarts += u64::from(restarted);
            rank.fence(number, restarted, out);
        }
    }

    fn body(&mut self, body: &[u8], out: &mut Vec<(u32, Action)>) {
        let events = match decode_drain(body, self.block_size.tokens()) {
            Ok(events) => events,
            Err(reason) => {
                // It was drained: whatever it said is lost.
                out.push((0, Action::Dropped(reason)));
                return self.relearn(false, out);
            }
        };
        for event in events {
            match event {
                Ok(event) => match self.rank(event.rank) {
                    Some(rank) => rank.event(event, out),
                    None => out.push((event.rank, Action::Dropped(DropReason::BadField))),
                },
                // Its number is missing: the next event of its rank shows the gap.
                Err(reason) => out.push((0, Action::Dropped(reason))),
            }
        }
    }
}

impl Rank {
    fn state(&self, reached: bool, failing: bool) -> State {
        match () {
            () if !reached => State::Blind,
            () if failing => State::Degraded(Fault::Disconnected),
            () if self.removal_lost => State::Degraded(Fault::RemovalLost),
            () if self.complete => State::Live,
            () => State::Rebuilding,
        }
    }

    fn fence(&mut self, number: u32, restarted: bool, out: &mut Vec<(u32, Action)>) {
        self.epoch += 1;
        self.counters.resets += 1;
        self.next = None;
        self.complete = false;
        self.removal_lost = false;
        self.window = None;
        self.partial = Partial::default();
        self.used = [true, false, false, false];
        out.push((number, Action::Reset { epoch: self.epoch, restarted }));
    }

    fn event(&mut self, event: DrainEvent, out: &mut Vec<(u32, Action)>) {
        let DrainEvent { id, rank: number, window, group, data } = event;
        match self.next {
            Some(next) if id == next => {}
            Some(next) => {
                let restarted = id < next;
                *(if restarted { &mut self.counters.restarts } else { &mut self.counters.gaps }) += 1;
                self.fence(number, restarted, out);
                self.complete = id == 0;
            }
            None => self.complete = id == 0,
        }
        self.next = Some(id + 1);
        self.counters.batches += 1;
        if let Some(window) = window {
            if self.window.is_some_and(|largest| window < largest) {
                if data != Ok(Drained::Created) {
                    out.push((number, Action::Dropped(DropReason::IgnoredGroup)));
                }
                return;
            }
            if self.window.is_some_and(|largest| window > largest) && self.counters.events > 0 {
                // What was believed so far was about a smaller window.
                let (next, complete) = (self.next, self.complete);
                self.fence(number, false, out);
                (self.next, self.complete) = (next, complete);
            }
            self.window = Some(window);
        }
        match data {
            Ok(data) => self.apply(number, group, data, out),
            Err(reason) => {
                self.removal_lost |= reason == DropReason::BadRemoval;
                out.push((number, Action::Dropped(reason)));
            }
        }
    }

    fn apply(&mut self, number: u32, group: GroupId, data: Drained, out: &mut Vec<(u32, Action)>) {
        let mut events = Vec::new();
        match data {
            Drained::Created | Drained::Nothing => {}
            Drained::Stored { mut stored, partial } => {
                partial.iter().for_each(|&name| self.partial.remember(name));
                out.extend(partial.iter().map(|_| (number, Action::Dropped(DropReason::PartialBlock))));
                self.used[stored.tier as usize] = true;
                stored.group = group;
                let event = WireEvent::Stored(stored);
                let batch = Batch {
                    ts_s: 0.0,
                    dp_rank: None,
                    events: vec![event],
                    dropped: Vec::new(),
                    unknown_media: 0,
                };
                let mut dropped = Vec::new();
                self.resolver.resolve(&batch, &mut events, &mut dropped);
                out.extend(dropped.into_iter().map(|reason| (number, Action::Dropped(reason))));
            }
            Drained::Removed(hashes) => {
                let whole: Vec<EngineHash> =
                    hashes.into_iter().filter(|name| !self.partial.names.contains(name)).collect();
                if !whole.is_empty() {
                    let used = Tier::ALL.into_iter().filter(|&tier| self.used[tier as usize]);
                    events.extend(used.map(|tier| KvEvent::Removed { tier, group, hashes: whole.clone() }));
                }
            }
            Drained::Moved { hash, .. } if self.partial.names.contains(&hash) => {}
            Drained::Moved { hash, from, to } => {
                self.used[to as usize] = true;
                let group_kind = Group { id: group, ..Group::default() };
                // First the new place, so that the name is never without one.
                events.push(KvEvent::StoredByHash { tier: to, group: group_kind, hashes: vec![hash] });
                events.push(KvEvent::Removed { tier: from, group, hashes: vec![hash] });
            }
        }
        self.counters.events += events.len() as u64;
        out.extend(events.into_iter().map(|event| (number, Action::Apply(event))));
    }
}

#[cfg(test)]
mod tests;
