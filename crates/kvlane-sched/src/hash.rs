//! A quick hasher for maps whose keys are numbers that no client chooses freely.
//!
//! Workers, request ids and block ids are numbered or hashed by the caller already; the standard library's keyed hash would cost more than
//! the rest of a decision.

use crate::rng::mix;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map keyed by small numbers.
pub(crate) type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mixing>>;

/// Folds each word in and scrambles it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Mixing(u64);

impl Hasher for Mixing {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0.rotate_left(5) ^ word.wrapping_add(0x9E37_79B9_7F4A_7C15));
    }
}
