//! Live batches that wait while a replay runs, in the order of their arrival.
//!
//! Bounded by count and bytes. When full, new batches are refused: what is in it stays contiguous, and what was refused
//! is a hole that the next replay fills.

use super::Limits;
use super::recent::fingerprint;
use std::collections::VecDeque;

/// A published batch that waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Waiting {
    pub(super) seq: u64,
    pub(super) payload: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Buffer {
    queue: VecDeque<Waiting>,
    bytes: usize,
}

impl Buffer {
    /// `false` if the buffer is full.
    pub(super) fn push(&mut self, seq: u64, payload: &[u8], limits: &Limits) -> bool {
        if self.queue.len() >= limits.buffer_batches || self.bytes + payload.len() > limits.buffer_bytes {
            return false;
        }
        self.bytes += payload.len();
        self.queue.push_back(Waiting { seq, payload: payload.to_vec() });
        true
    }

    /// Gives back what [`Buffer::pop`] took.
    pub(super) fn unpop(&mut self, waiting: Waiting) {
        self.bytes += waiting.payload.len();
        self.queue.push_front(waiting);
    }

    pub(super) fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.queue.pop_front()?;
        self.bytes -= waiting.payload.len();
        Some(waiting)
    }

    /// Whether a batch of this number and fingerprint waits.
    pub(super) fn has(&self, seq: u64, print: u64) -> bool {
        self.queue.iter().any(|waiting| waiting.seq == seq && fingerprint(&waiting.payload) == print)
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.bytes = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
