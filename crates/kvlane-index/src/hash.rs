//! From tokens to block hashes: the one place that decides when two blocks are the same.
//!
//! A block hash is XXH3-64 over the block's token ids (u32, little-endian), seeded; the seed of a plain prompt is
//! 1337, as in the reference system, so that hashes can be exchanged with its tools. What else decides a block's identity
//! enters injectively, each under a domain of its own:
//!
//! * an adapter (LoRA) changes the seed of *every* block, as the engines do;
//! * a cache salt changes the seed of the *first* block only. Engines name it only there, and the chain carries
//!   it on;
//! * media that a block contains are hashed after its tokens: domain byte, then for each item the offset inside the
//!   block (signed) and the identifier with its length.
//!
//! Requests and engine events must agree on every one of these, so both call [`block_hashes`].
//!
//! Collisions: two different blocks share a hash with probability 2^-64; among n = 10^7 distinct blocks the odds that
//! any two do are n^2 / 2^65, about 3 in a million. The index confirms a prefix by its whole chain, so one collision can only
//! mislead at that one block.

use crate::BlockHash;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The seed of a plain prompt (no adapter, no salt).
pub const BASE_SEED: u64 = 1337;

/// Tokens in a block: at least 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockSize(std::num::NonZeroU32);

impl BlockSize {
    /// `None` for 0: an engine that prints it means "unknown".
    pub fn new(tokens: u32) -> Option<Self> {
        std::num::NonZeroU32::new(tokens).map(Self)
    }

    /// Tokens in a block.
    pub const fn tokens(self) -> u32 {
        self.0.get()
    }
}

/// What separates equal tokens into different caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Namespace<'a> {
    /// Name of the LoRA adapter; `None` or empty = the base model.
    pub adapter: Option<&'a str>,
    /// The request's cache salt; `None` or empty = none.
    pub salt: Option<&'a str>,
}

/// A picture, sound or other item inside a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Media<'a> {
    /// First token of the item relative to the block's first token; negative if it began in an earlier block.
    pub offset: i64,
    /// The engine's identifier of the item.
    pub identifier: &'a str,
}

impl Namespace<'_> {
    /// The seed of every block but the first.
    pub fn seed(&self) -> u64 {
        match self.adapter {
            None | Some("") => BASE_SEED,
            Some(name) => xxh3_64_with_seed(&framed(b'L', name), BASE_SEED),
        }
    }

    /// The seed of the first block of a prompt.
    pub fn root_seed(&self) -> u64 {
        match self.salt {
            None | Some("") => self.seed(),
            Some(salt) => xxh3_64_with_seed(&framed(b'S', salt), self.seed()),
        }
    }
}

/// Domain byte, length, bytes: no two lists of frames are the same bytes.
fn framed(domain: u8, text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 9);
    out.push(domain);
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    out
}

/// Hashes of the whole blocks of `tokens`, appended to `out`; a rest shorter than a block is left out.
///
/// `at_root` says that the first token is the first of the prompt (only there does a salt count). `media(i)` lists what
/// the i-th block contains, in any order.
pub fn block_hashes<'m, M, I>(
    tokens: &[u32],
    block_size: BlockSize,
    namespace: &Namespace<'_>,
    at_root: bool,
    mut media: M,
    out: &mut Vec<BlockHash>,
) where
    M: FnMut(usize) -> I,
    I: IntoIterator<Item = Media<'m>>,
{
    let seed = namespace.seed();
    let mut block_seed = if at_root { namespace.root_seed() } else { seed };
    let mut bytes = Vec::new();
    for (i, block) in tokens.chunks_exact(block_size.tokens() as usize).enumerate() {
        let mut items: Vec<Media<'m>> = media(i).into_iter().collect();
        if items.is_empty() && cfg!(target_endian = "little") {
            // The tokens lie in memory as they are hashed.
            out.push(BlockHash(xxh3_64_with_seed(bytemuck::cast_slice(block), block_seed)));
            block_seed = seed;
            continue;
        }
        bytes.clear();
        for token in block {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        items.sort_unstable();
        for item in items {
            bytes.push(b'M');
            bytes.extend_from_slice(&item.offset.to_le_bytes());
            bytes.extend_from_slice(&framed(b'm', item.identifier));
        }
        out.push(BlockHash(xxh3_64_with_seed(&bytes, block_seed)));
        block_seed = seed;
    }
}

/// [`block_hashes`] of a whole prompt without media.
pub fn prompt_hashes(
    tokens: &[u32],
    block_size: BlockSize,
    namespace: &Namespace<'_>,
    out: &mut Vec<BlockHash>,
) {
    block_hashes(tokens, block_size, namespace, true, |_| [], out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(tokens: &[u32], namespace: Namespace<'_>) -> Vec<u64> {
        let mut out = Vec::new();
        prompt_hashes(tokens, BlockSize::new(2).unwrap(), &namespace, &mut out);
        out.iter().map(|h| h.0).collect()
    }

    #[test]
    fn plain_blocks_hash_as_the_reference_does() {
        let bytes: Vec<u8> = [1u32, 2].iter().flat_map(|t| t.to_le_bytes()).collect();
        assert_eq!(hashes(&[1, 2, 3], Namespace::default()), [xxh3_64_with_seed(&bytes, 1337)]);
    }

    #[test]
    fn salt_counts_at_the_root_only_and_the_adapter_everywhere() {
        let plain = hashes(&[1, 2, 3, 4], Namespace::default());
        let salted = hashes(&[1, 2, 3, 4], Namespace { salt: Some("s"), ..Default::default() });
        let adapted = hashes(&[1, 2, 3, 4], Namespace { adapter: Some("s"), ..Default::default() });
        assert_ne!(plain[0], salted[0]);
        assert_eq!(plain[1], salted[1]);
        assert_ne!(plain[0], adapted[0]);
        assert_ne!(plain[1], adapted[1]);
        assert_ne!(salted[0], adapted[0]);
    }

    #[test]
    fn empty_adapter_and_salt_are_none() {
        let empty = Namespace { adapter: Some(""), salt: Some("") };
        assert_eq!(hashes(&[1, 2], empty), hashes(&[1, 2], Namespace::default()));
    }
}
