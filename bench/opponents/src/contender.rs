//! What an index must be able to do to be measured here.
//!
//! A contender takes events and prompts in its own form, so that no conversion is ever timed, and answers through the call
//! that its users make. Everything is synchronous: a pooled or asynchronous index does what its user would do, and
//! blocks.

use std::collections::BTreeMap;

use kvlane_index::{BlockHash, KvEvent, Worker};

/// One event with its publisher.
pub type Event = (Worker, KvEvent);

/// Leading blocks by worker; workers that hold nothing are absent.
pub type Answer = BTreeMap<Worker, u32>;

/// What is known before the first event.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Workers that will publish: a hint.
    pub workers: usize,
    /// Threads that apply events, for an index that has threads of its own.
    pub event_threads: usize,
}

/// Workers listed and blocks summed over them: enough that nothing of an answer is optimised away, and cheap enough to
/// compare after every timed query.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Workers with an overlap.
    pub workers: usize,
    /// Their overlaps, summed, in blocks.
    pub blocks: u64,
}

/// An index behind its public API.
pub trait Contender: Send + Sync + 'static {
    /// Names in tables of the ways to ask it. The first is what its users call, and names the index itself.
    const WAYS: &'static [&'static str];
    /// Events in its own form.
    type Batch: Send + 'static;
    /// A prompt in its own form.
    type Prompt: Send + Sync + 'static;

    /// An empty index.
    fn new(setup: Setup) -> Self;
    /// Converts events; not timed.
    fn batch(&self, events: &[Event]) -> Self::Batch;
    /// Converts a prompt; not timed.
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt;
    /// Hands events over; may return before they are applied. Timed, and so is dropping them.
    fn apply(&self, batch: Self::Batch);
    /// Returns once all that was handed over is visible to queries. Timed.
    fn settle(&self);
    /// Answers in one of its ways and drops the answer. Timed.
    fn ask(&self, way: usize, prompt: &Self::Prompt) -> Tally;
    /// The same answer in full; not timed, the same for all ways.
    fn answer(&self, prompt: &Self::Prompt) -> Answer;
    /// Forgets one worker; returns when queries no longer list it. Timed.
    fn remove(&self, worker: Worker);
    /// Bytes that the counting allocator does not see (own memory maps).
    fn unseen_bytes(&self) -> usize {
        0
    }
}
