//! XXH3-64 of many blocks of one length under one seed.
//!
//! A block is short, so a general implementation spends more on choosing its way by length, and on deriving its keys from the
//! seed, than on hashing; both are the same for all blocks of a prompt. Here the keys are made once, and for the usual block sizes
//! the way is chosen once: blocks do not wait for one another, so the processor hashes several at a time. What a block costs is
//! multiplications of 64 by 64 bits to 128, of which vector units have none. Four blocks in the lanes of AVX2, each product made of
//! four narrow ones, took 3.2 ns a block instead of 4.6 (Zen 3) where the tokens were in the first cache, but 8 % less where they were not, as
//! a prompt's are: not worth a second way.
//!
//! The function is XXH3's, as specified for inputs of 17 to 128 bytes in
//! <https://github.com/Cyan4973/xxHash/blob/v0.8.3/doc/xxhash_spec.md#xxh3-algorithm-overview>; other lengths go through the crate xxhash-rust,
//! whose answers the tests compare.

use crate::{BlockHash, BlockSize};
use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::{xxh3_64_with_secret, xxh3_64_with_seed};

/// Inputs longer than this are hashed by stripes, under a secret derived from the seed.
const MID_SIZE_MAX: usize = 240;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME_MX1: u64 = 0x1656_6791_9E37_79F9;

/// Hashes blocks under one seed.
#[derive(Clone, Debug)]
pub(crate) struct BlockHasher {
    seed: u64,
    /// The default secret with the seed added to and taken from its words in turn.
    secret: [u8; 192],
    /// Its first words: what a short input is combined with.
    keys: [u64; 16],
}

impl BlockHasher {
    pub(crate) const fn new(seed: u64) -> Self {
        let secret = const_custom_default_secret(seed);
        let mut keys = [0; 16];
        let mut at = 0;
        while at < 128 {
            keys[at / 8] |= (secret[at] as u64) << (at % 8 * 8);
            at += 1;
        }
        Self { seed, secret, keys }
    }

    /// Appends the hashes of the whole blocks of `tokens`.
    pub(crate) fn append(&self, tokens: &[u32], size: BlockSize, out: &mut Vec<BlockHash>) {
        match size.tokens() {
            8 => self.append_short::<8>(tokens, out),
            16 => self.append_short::<16>(tokens, out),
            32 => self.append_short::<32>(tokens, out),
            size => {
                let mut buffer = Vec::new();
                let blocks = tokens.chunks_exact(size as usize);
                out.extend(blocks.map(|block| BlockHash(self.long(little_endian(block, &mut buffer)))));
            }
        }
    }

    fn append_short<const TOKENS: usize>(&self, tokens: &[u32], out: &mut Vec<BlockHash>) {
        let (blocks, _) = tokens.as_chunks::<TOKENS>();
        out.extend(blocks.iter().map(|block| BlockHash(self.short(block))));
    }

    fn long(&self, bytes: &[u8]) -> u64 {
        match bytes.len() {
            0..=MID_SIZE_MAX => xxh3_64_with_seed(bytes, self.seed),
            _ => xxh3_64_with_secret(bytes, &self.secret),
        }
    }

    /// A block of 32, 64 or 128 bytes: its pairs of words from both ends to the middle.
    #[inline(always)]
    fn short<const TOKENS: usize>(&self, block: &[u32; TOKENS]) -> u64 {
        let word = |i: usize| u64::from(block[2 * i]) | u64::from(block[2 * i + 1]) << 32;
        let pair = |i: usize, key: usize| fold(word(i) ^ self.keys[key], word(i + 1) ^ self.keys[key + 1]);
        let mut sum = (4 * TOKENS as u64).wrapping_mul(PRIME64_1);
        for i in 0..TOKENS / 8 {
            sum = sum.wrapping_add(pair(2 * i, 4 * i));
            sum = sum.wrapping_add(pair(TOKENS / 2 - 2 - 2 * i, 4 * i + 2));
        }
        sum = (sum ^ (sum >> 37)).wrapping_mul(PRIME_MX1);
        sum ^ (sum >> 32)
    }
}

/// Both halves of the product, combined.
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// The tokens as they are hashed: little-endian, which on most machines is how they lie in memory.
pub(crate) fn little_endian<'b>(tokens: &'b [u32], buffer: &'b mut Vec<u8>) -> &'b [u8] {
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(tokens);
    }
    buffer.clear();
    buffer.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_size_hashes_as_xxh3_does() {
        let mut state = 0x5eed_u64;
        for seed in [0, 1, 1337, u64::MAX, 0x0123_4567_89ab_cdef] {
            let hasher = BlockHasher::new(seed);
            for size in (1..=70).chain([128, 256, 513]) {
                let tokens: Vec<u32> = std::iter::repeat_with(|| {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    (state >> 32) as u32
                })
                .take(5 * size + size / 2)
                .collect();
                let mut hashes = Vec::new();
                hasher.append(&tokens, BlockSize::new(size as u32).unwrap(), &mut hashes);
                let expected: Vec<BlockHash> = tokens
                    .chunks_exact(size)
                    .map(|block| block.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>())
                    .map(|bytes| BlockHash(xxh3_64_with_seed(&bytes, seed)))
                    .collect();
                assert_eq!(hashes, expected, "seed {seed}, {size} tokens");
            }
        }
    }
}
