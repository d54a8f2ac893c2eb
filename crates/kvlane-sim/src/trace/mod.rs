//! Requests to simulate: when they come, how long they are, and which blocks of their prompts are equal.
//!
//! Every format is read into one [`Trace`]. Block ids are interned to dense numbers, in order of first sight; equal ids mean equal *prefixes*
//! (ids are chained), as all formats that carry ids have it.

mod arrival;
mod generate;
mod read;

pub use arrival::Shape;
pub use generate::{Nature, generate};
pub use read::{Format, PromptMode, ReadError, ReadOptions, read};

use std::ops::Range;

/// When a request comes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Start {
    /// At this time (open loop).
    AtMs(f64),
    /// This long after the answer to the session's previous request has ended (closed loop).
    AfterMs(f64),
}

/// One request of a trace.
#[derive(Clone, Debug)]
pub struct TraceRequest {
    /// The session that it belongs to; requests of one session are in order. A request without session has one of its own.
    pub session: u32,
    /// When it comes.
    pub start: Start,
    /// Length of its prompt.
    pub input_tokens: u32,
    /// Length of its answer.
    pub output_tokens: u32,
    ids: Range<usize>,
}

/// A list of requests, open-loop ones ordered by time and the turns of a session in order.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// What to call it in reports.
    pub name: String,
    /// Tokens that each block id stands for.
    pub block_tokens: u32,
    /// The requests.
    pub requests: Vec<TraceRequest>,
    arena: Vec<u32>,
    distinct: u32,
    sessions: u32,
}

impl Trace {
    /// A trace without requests.
    pub fn new(name: &str, block_tokens: u32) -> Self {
        assert!(block_tokens > 0, "a block has tokens");
        Self { name: name.to_owned(), block_tokens, ..Self::default() }
    }

    /// Ids of the whole blocks of a request's prompt: a partly filled last block is never cached and not among them.
    pub fn blocks(&self, request: &TraceRequest) -> &[u32] {
        &self.arena[request.ids.clone()]
    }

    /// Ids are below this.
    pub const fn distinct_blocks(&self) -> u32 {
        self.distinct
    }

    /// Session numbers are below this.
    pub const fn sessions(&self) -> u32 {
        self.sessions
    }

    /// Prompt tokens of all requests.
    pub fn input_tokens(&self) -> u64 {
        self.requests.iter().map(|r| u64::from(r.input_tokens)).sum()
    }

    /// Adds a request of a session numbered by the caller. Ids beyond the whole blocks of the prompt are left out.
    pub fn push(&mut self, session: u32, start: Start, input_tokens: u32, output_tokens: u32, ids: &[u32]) {
        let input_tokens = input_tokens.max(1);
        let whole = (input_tokens / self.block_tokens) as usize;
        let from = self.arena.len();
        self.arena.extend_from_slice(&ids[..ids.len().min(whole)]);
        for id in &self.arena[from..] {
            self.distinct = self.distinct.max(id + 1);
        }
        self.sessions = self.sessions.max(session + 1);
        self.requests.push(TraceRequest {
            session,
            start,
            input_tokens,
            output_tokens: output_tokens.max(1),
            ids: from..self.arena.len(),
        });
    }
}

#[cfg(test)]
mod tests;
