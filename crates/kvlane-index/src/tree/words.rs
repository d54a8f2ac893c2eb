//! Memory that never moves and is never freed while readers may look: 64-bit atomic words in chunks.
//!
//! Readers run beside the writer without locks, so a reader may follow an offset that has just been reused. Here that is
//! harmless: every offset leads to some word or, past the end, to 0, and the versions of the runs tell the reader that what
//! it saw does not belong together. All accesses are relaxed; ordering is the business of those versions.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Words in a chunk, as a power of two: the largest block that [`Slab`] gives.
pub(super) const CHUNK_BITS: u32 = 16;
const CHUNK: usize = 1 << CHUNK_BITS;
const LINE: usize = 8;

#[derive(Debug)]
struct Chunk {
    words: Box<[AtomicU64]>,
    /// Words before the first cache line boundary.
    skip: usize,
}

impl Chunk {
    fn new(words: usize) -> Self {
        // Zeroed by the system when it is first touched, not here.
        let words: Box<[AtomicU64]> = bytemuck::zeroed_slice_box(words + LINE);
        let skip = words.as_ptr().align_offset(LINE * size_of::<u64>()).min(LINE);
        Self { words, skip }
    }
}

/// A growing array of words, aligned to cache lines.
#[derive(Debug)]
pub(super) struct Words {
    chunks: Box<[OnceLock<Chunk>]>,
    /// Words in each chunk.
    chunk: usize,
}

impl Words {
    /// An array that may grow to `chunks` chunks of 2^16 words.
    pub(super) fn new(chunks: usize) -> Self {
        Self { chunks: std::iter::repeat_with(OnceLock::new).take(chunks).collect(), chunk: CHUNK }
    }

    /// An array of one chunk with no more than `words` words, at most 2^16.
    pub(super) fn flat(words: u32) -> Self {
        Self { chunk: words as usize, ..Self::new(1) }
    }

    /// Words from `at` to the end of its chunk; empty past the end of the array.
    #[inline]
    pub(super) fn from(&self, at: u32) -> &[AtomicU64] {
        match self.chunks.get((at >> CHUNK_BITS) as usize).and_then(OnceLock::get) {
            Some(chunk) => chunk.words.get(chunk.skip + (at as usize & (CHUNK - 1))..).unwrap_or(&[]),
            None => &[],
        }
    }

    #[inline]
    pub(super) fn get(&self, at: u32) -> u64 {
        self.from(at).first().map_or(0, |word| word.load(Relaxed))
    }

    #[inline]
    pub(super) fn set(&self, at: u32, value: u64) {
        if let Some(word) = self.from(at).first() {
            word.store(value, Relaxed);
        }
    }

    /// Makes the chunk that holds word `at`; false at the limit of the array.
    pub(super) fn reach(&self, at: u32) -> bool {
        match self.chunks.get((at >> CHUNK_BITS) as usize) {
            Some(chunk) => {
                chunk.get_or_init(|| Chunk::new(self.chunk));
                true
            }
            None => false,
        }
    }
}

/// The writer's allocator over an array of words: blocks of 2^k words that never cross a chunk.
#[derive(Debug, Default)]
pub(super) struct Slab {
    free: [Vec<u32>; CHUNK_BITS as usize + 1],
    chunks: u32,
    /// Words handed out and not given back.
    pub(super) live: u64,
}

impl Slab {
    /// A block of 2^`class` words with arbitrary content; `None` when the array is full.
    pub(super) fn take(&mut self, words: &Words, class: u32) -> Option<u32> {
        let from = (class..=CHUNK_BITS).find(|&k| !self.free[k as usize].is_empty());
        let (at, mut size) = match from {
            Some(k) => (self.free[k as usize].pop().expect("found not empty"), k),
            None => {
                let at = self.chunks.checked_mul(CHUNK as u32)?;
                if !words.reach(at) {
                    return None;
                }
                self.chunks += 1;
                (at, CHUNK_BITS)
            }
        };
        while size > class {
            size -= 1;
            self.free[size as usize].push(at + (1 << size));
        }
        self.live += 1 << class;
        Some(at)
    }

    pub(super) fn give(&mut self, at: u32, class: u32) {
        self.live -= 1 << class;
        self.free[class as usize].push(at);
    }
}

/// The class of the smallest block that holds `words` words.
pub(super) fn class_of(words: u32) -> u32 {
    words.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_do_not_overlap_and_come_back() {
        let words = Words::new(2);
        let mut slab = Slab::default();
        let a = slab.take(&words, 3).unwrap();
        let b = slab.take(&words, 0).unwrap();
        let c = slab.take(&words, 3).unwrap();
        assert!(a + 8 <= c || c + 8 <= a);
        assert!(!(a..a + 8).contains(&b) && !(c..c + 8).contains(&b));
        assert_eq!(slab.live, 17);
        slab.give(a, 3);
        assert_eq!(slab.take(&words, 3), Some(a));
        assert!(slab.take(&words, CHUNK_BITS).is_some());
        assert_eq!(slab.take(&words, CHUNK_BITS), None, "two chunks and no more");
    }

    #[test]
    fn past_the_end_is_zero() {
        let words = Words::new(1);
        assert_eq!(words.get(5), 0);
        assert_eq!(words.get(u32::MAX), 0);
        assert!(words.reach(5));
        words.set(5, 7);
        assert_eq!(words.get(5), 7);
        let words = Words::flat(100);
        assert!(words.reach(0));
        words.set(50_000, 7);
        assert_eq!((words.get(99), words.get(50_000)), (0, 0));
    }
}
