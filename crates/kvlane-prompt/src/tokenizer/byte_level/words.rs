//! Short words and their tokens, as they came before.
//!
//! Most words of any text were seen a moment ago. A table of fixed size keeps the last word of each slot: no eviction, no growth, and at
//! most one comparison. Each encoding has a table of its own, so nothing is locked.

use xxhash_rust::xxh3::xxh3_64;

/// Slots: 640 KB, about the words of a long text.
const SLOTS: usize = 1 << 14;
/// Longest word that is kept, in bytes.
const WORD_BYTES: usize = 22;
/// Most tokens of a word that is kept.
const WORD_TOKENS: usize = 4;

/// The table.
#[derive(Debug)]
pub(super) struct Words(Box<[Slot]>);

#[derive(Clone, Copy, Debug)]
struct Slot {
    tokens: [u32; WORD_TOKENS],
    word: [u8; WORD_BYTES],
    /// 0 = empty.
    word_len: u8,
    token_count: u8,
}

impl Words {
    /// An empty table.
    pub(super) fn new() -> Self {
        let empty = Slot { tokens: [0; WORD_TOKENS], word: [0; WORD_BYTES], word_len: 0, token_count: 0 };
        Self(vec![empty; SLOTS].into())
    }

    /// Appends the tokens of `word` (not empty) to `ids`; `encode` does it where they are not known.
    #[inline]
    pub(super) fn ids(&mut self, word: &[u8], ids: &mut Vec<u32>, encode: impl FnOnce(&mut Vec<u32>)) {
        if word.len() > WORD_BYTES {
            return encode(ids);
        }
        let slot = &mut self.0[xxh3_64(word) as usize % SLOTS];
        if slot.word.get(..usize::from(slot.word_len)) == Some(word) {
            ids.extend_from_slice(&slot.tokens[..usize::from(slot.token_count)]);
            return;
        }
        let start = ids.len();
        encode(ids);
        let tokens = &ids[start..];
        if tokens.len() <= WORD_TOKENS {
            slot.tokens[..tokens.len()].copy_from_slice(tokens);
            slot.token_count = tokens.len() as u8;
            slot.word[..word.len()].copy_from_slice(word);
            slot.word_len = word.len() as u8;
        }
    }
}
