//! What goes into an engine and what its cache says.
//!
//! The engine works on block hashes, not on tokens, so that a simulation of a trace (which has hashes only) and a mock
//! engine (which has tokens) run the same code. Tokens are carried along where they exist, for the events' `token_ids`.

use kvlane_index::{BlockHash, KvEvent};
use std::sync::Arc;

/// A request's name, chosen by whoever submits it; unique among the requests that an engine has not finished.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// One prompt with one answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Length of the prompt; at least 1.
    pub prompt_tokens: u32,
    /// Length of the answer; at least 1.
    pub output_tokens: u32,
    /// Hashes of the whole blocks of the prompt followed by the answer, from the root, as `kvlane_index::hash` makes them.
    ///
    /// May end early: blocks that it does not name are taken as found nowhere else (an answer that nobody sends back).
    pub blocks: Vec<BlockHash>,
    /// The tokens themselves, where an event has to name them.
    pub content: Option<Arc<Content>>,
}

/// What a request's blocks contain, as an engine's events say it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Content {
    /// The prompt followed by the answer.
    pub tokens: Vec<u32>,
    /// The LoRA adapter: its number in the engine's process (from 1) and its name.
    pub adapter: Option<(u32, String)>,
    /// The cache salt.
    pub salt: Option<String>,
}

/// A change of the cache, and what an engine would say about the blocks beyond their hashes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheEvent {
    /// The change.
    pub event: KvEvent,
    /// For `Stored`, if the request came with content: what the blocks contain.
    pub content: Option<StoredContent>,
}

/// The content of the blocks that an event names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredContent {
    /// The whole request's.
    pub content: Arc<Content>,
    /// Position in the request of the event's first block.
    pub first_block: u32,
}
