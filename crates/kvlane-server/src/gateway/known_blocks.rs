//! Block hashes of prompts whose beginning was hashed before.
//!
//! A conversation comes back with all that was said, and hashing it anew costs more with every turn. The tokenizer names the beginnings that it knows
//! ([`Prefix`]); here the hashes of their whole blocks are kept under those names, so that a turn hashes its new tokens only. What is
//! kept is never needed: without it, or after it was dropped, the same hashes are made from the tokens.

use kvlane_index::hash::{Namespace, block_hashes};
use kvlane_index::{BlockHash, BlockSize};
use kvlane_prompt::Prefix;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// Memory for kept hashes: 8 bytes a block, so 32 million tokens in blocks of 16 that are named once.
const KEPT_BYTES: u64 = 16 << 20;
/// Prefixes of a prompt that are looked up, the longest first: more turns than a client goes back.
const LOOKUPS_MAX: usize = 16;

/// What beside the tokens decides the hashes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    prefix: u128,
    root_seed: u64,
    seed: u64,
    block_size: BlockSize,
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<Key, Arc<[BlockHash]>> for ByBytes {
    fn weight(&self, _: &Key, hashes: &Arc<[BlockHash]>) -> u64 {
        (size_of_val(&**hashes) + size_of::<Key>() + 64) as u64
    }
}

/// Hashes by the names of prefixes. Shared by all requests; sharded, so that they rarely wait for one another.
#[derive(Debug)]
pub(crate) struct KnownBlocks(Cache<Key, Arc<[BlockHash]>, ByBytes>);

impl KnownBlocks {
    /// Nothing known.
    pub(crate) fn new() -> Self {
        Self(Cache::with_weighter(4096, KEPT_BYTES, ByBytes))
    }

    /// The hashes of the whole blocks of `tokens`, whose beginnings are named by `prefixes` (shortest first); the first `known_tokens` may have been
    /// seen before.
    pub(crate) fn hashes(
        &self,
        tokens: &[u32],
        prefixes: &[Prefix],
        known_tokens: usize,
        block_size: BlockSize,
        namespace: &Namespace<'_>,
    ) -> Arc<[BlockHash]> {
        let key = |prefix: &Prefix| Key {
            prefix: prefix.id,
            root_seed: namespace.root_seed(),
            seed: namespace.seed(),
            block_size,
        };
        let size = block_size.tokens() as usize;
        let mut hashes = Vec::with_capacity(tokens.len() / size);
        let seen = &prefixes[..prefixes.partition_point(|prefix| prefix.tokens <= known_tokens)];
        for prefix in seen.iter().rev().take(LOOKUPS_MAX) {
            if let Some(found) = self.0.get(&key(prefix))
                && let Some(found) = found.get(..prefix.tokens / size)
            {
                if prefix.tokens == tokens.len() {
                    return found.into();
                }
                hashes.extend_from_slice(found);
                break;
            }
        }
        let done = hashes.len() * size;
        block_hashes(&tokens[done..], block_size, namespace, done == 0, |_| [], &mut hashes);
        let hashes: Arc<[BlockHash]> = hashes.into();
        // The last segment ends where the text does, and the one before it where the next turn begins.
        for prefix in prefixes.iter().rev().take(2).filter(|prefix| prefix.tokens >= size) {
            self.0.insert(key(prefix), Arc::clone(&hashes));
        }
        hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvlane_index::hash::prompt_hashes;

    /// SplitMix64.
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The names that a tokenizer would give: of each stretch of tokens its own, wherever the stretches are cut.
    fn prompt(segments: &[Vec<u32>]) -> (Vec<u32>, Vec<Prefix>) {
        let mut tokens = Vec::new();
        let prefixes = segments.iter().map(|segment| {
            tokens.extend_from_slice(segment);
            let bytes: Vec<u8> = tokens.iter().flat_map(|token: &u32| token.to_le_bytes()).collect();
            Prefix { tokens: tokens.len(), id: xxhash_rust::xxh3::xxh3_128(&bytes) }
        });
        let prefixes = prefixes.collect();
        (tokens, prefixes)
    }

    #[test]
    fn resumed_hashes_are_those_from_scratch() {
        for seed in 0..300 {
            let mut state = seed;
            let known = KnownBlocks::new();
            let mut conversations: Vec<Vec<Vec<u32>>> = vec![Vec::new()];
            for step in 0..40 {
                // A fork, a retry, or the next turn of any conversation so far.
                let mut segments = conversations[random(&mut state) as usize % conversations.len()].clone();
                segments.truncate(segments.len().saturating_sub(random(&mut state) as usize % 3));
                for _ in 0..random(&mut state) % 4 {
                    let tokens = 1 + random(&mut state) % 40;
                    segments.push((0..tokens).map(|_| random(&mut state) as u32 % 3).collect());
                }
                let (tokens, prefixes) = prompt(&segments);
                let size = BlockSize::new([1, 4, 16][random(&mut state) as usize % 3]).unwrap();
                let adapter = [None, Some("a")][random(&mut state) as usize % 2];
                let salt = [None, Some("s"), Some("t")][random(&mut state) as usize % 3];
                let namespace = Namespace { adapter, salt, ..Namespace::default() };
                let mut scratch = Vec::new();
                prompt_hashes(&tokens, size, &namespace, &mut scratch);
                let seen = random(&mut state) as usize % (tokens.len() + 1);
                let resumed = known.hashes(&tokens, &prefixes, seen, size, &namespace);
                assert_eq!(*resumed, *scratch, "seed {seed}, step {step}");
                conversations.push(segments);
            }
        }
    }
}
