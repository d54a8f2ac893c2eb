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
use crate::block_hash::{BlockHasher, little_endian};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

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

/// Whose rules turn a block's tokens, adapter, salt and media into its hash. Plain blocks hash alike in both.
///
/// Hashes travel between processes under the number of their scheme; they mean nothing under another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Scheme {
    /// kvlane's: everything enters injectively (the module's description).
    #[default]
    Kvlane,
    /// The reference system's, for clients that hash by its rules: the hashes of adapter and salt are *added* to the seed, and
    /// media enter as their sorted 64-bit ids, without their places. Here too a salt counts in the first block only, as the
    /// engines' events do; the reference adds it to every block of a request, where the events of a longer chain do not.
    Reference,
}

impl Scheme {
    /// All schemes.
    pub const ALL: [Self; 2] = [Self::Kvlane, Self::Reference];

    /// Its number on the wire and in files; never used again for another one.
    pub const fn id(self) -> u32 {
        match self {
            Self::Kvlane => 1,
            Self::Reference => 2,
        }
    }

    /// The scheme of this number.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|scheme| scheme.id() == id)
    }

    /// The name used in JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvlane => "kvlane",
            Self::Reference => "reference",
        }
    }
}

/// What separates equal tokens into different caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Namespace<'a> {
    /// Name of the LoRA adapter; `None` or empty = the base model.
    pub adapter: Option<&'a str>,
    /// The request's cache salt; `None` or empty = none.
    pub salt: Option<&'a str>,
    /// By whose rules.
    pub scheme: Scheme,
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
        match (self.adapter, self.scheme) {
            (None | Some(""), _) => BASE_SEED,
            (Some(name), Scheme::Kvlane) => xxh3_64_with_seed(&framed(b'L', name), BASE_SEED),
            (Some(name), Scheme::Reference) => BASE_SEED.wrapping_add(xxh3_64(name.as_bytes())),
        }
    }

    /// The seed of the first block of a prompt.
    pub fn root_seed(&self) -> u64 {
        match (self.salt, self.scheme) {
            (None | Some(""), _) => self.seed(),
            (Some(salt), Scheme::Kvlane) => xxh3_64_with_seed(&framed(b'S', salt), self.seed()),
            (Some(salt), Scheme::Reference) => {
                self.seed().wrapping_add(xxh3_64_with_seed(salt.as_bytes(), 1))
            }
        }
    }
}

/// The reference's number for an item: the first 16 digits of 64 hexadecimal ones, else a hash of the text.
fn media_id(identifier: &str) -> u64 {
    let digits = identifier.len() == 64 && identifier.bytes().all(|b| b.is_ascii_hexdigit());
    let id = identifier.get(..16).filter(|_| digits).and_then(|head| u64::from_str_radix(head, 16).ok());
    id.unwrap_or_else(|| xxh3_64(identifier.as_bytes()))
}

/// Domain byte, length, bytes: no two lists of frames are the same bytes.
fn framed(domain: u8, text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 9);
    out.push(domain);
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    out
}

static PLAIN: BlockHasher = BlockHasher::new(BASE_SEED);

/// Hashes blocks that contain nothing but tokens.
struct Hashers {
    root_seed: u64,
    seed: u64,
    /// Under `seed`, unless that is the plain one.
    seeded: Option<BlockHasher>,
}

impl Hashers {
    fn new(namespace: &Namespace<'_>, at_root: bool) -> Self {
        let seed = namespace.seed();
        let root_seed = if at_root { namespace.root_seed() } else { seed };
        Self { root_seed, seed, seeded: (seed != BASE_SEED).then(|| BlockHasher::new(seed)) }
    }

    fn seed_of(&self, block: usize) -> u64 {
        if block == 0 { self.root_seed } else { self.seed }
    }

    /// Appends the hashes of whole blocks, the first of which is number `from`.
    fn append(&self, mut tokens: &[u32], size: BlockSize, from: usize, out: &mut Vec<BlockHash>) {
        if from == 0
            && self.root_seed != self.seed
            && let Some((first, rest)) = tokens.split_at_checked(size.tokens() as usize)
        {
            BlockHasher::new(self.root_seed).append(first, size, out);
            tokens = rest;
        }
        self.seeded.as_ref().unwrap_or(&PLAIN).append(tokens, size, out);
    }
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
    let hashers = Hashers::new(namespace, at_root);
    let size = block_size.tokens() as usize;
    let (blocks, mut done) = (tokens.len() / size, 0);
    for at in 0..blocks {
        let mut items = media(at).into_iter().peekable();
        if items.peek().is_none() {
            continue;
        }
        hashers.append(&tokens[done * size..at * size], block_size, done, out);
        let mut buffer = Vec::new();
        let mut bytes = little_endian(&tokens[at * size..(at + 1) * size], &mut buffer).to_vec();
        frame_media(namespace.scheme, items, &mut bytes);
        out.push(BlockHash(xxh3_64_with_seed(&bytes, hashers.seed_of(at))));
        done = at + 1;
    }
    hashers.append(&tokens[done * size..blocks * size], block_size, done, out);
}

fn frame_media<'m>(scheme: Scheme, items: impl Iterator<Item = Media<'m>>, bytes: &mut Vec<u8>) {
    match scheme {
        Scheme::Kvlane => {
            let mut items: Vec<Media<'m>> = items.collect();
            items.sort_unstable();
            for item in items {
                bytes.push(b'M');
                bytes.extend_from_slice(&item.offset.to_le_bytes());
                bytes.extend_from_slice(&framed(b'm', item.identifier));
            }
        }
        Scheme::Reference => {
            let mut ids: Vec<u64> = items.map(|item| media_id(item.identifier)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
        }
    }
}

/// [`block_hashes`] of a whole prompt without media.
pub fn prompt_hashes(
    tokens: &[u32],
    block_size: BlockSize,
    namespace: &Namespace<'_>,
    out: &mut Vec<BlockHash>,
) {
    prompt_hashes_in_stretches(tokens, block_size, namespace, out, |_| {});
}

/// Blocks hashed between two calls of `each`: their hashes are still in the nearest cache.
const STRETCH: usize = 64;

/// [`prompt_hashes`], with a call of `each` whenever some more hashes are in `out`.
pub(crate) fn prompt_hashes_in_stretches(
    tokens: &[u32],
    block_size: BlockSize,
    namespace: &Namespace<'_>,
    out: &mut Vec<BlockHash>,
    mut each: impl FnMut(&[BlockHash]),
) {
    let hashers = Hashers::new(namespace, true);
    let size = block_size.tokens() as usize;
    out.reserve(tokens.len() / size);
    for (at, stretch) in tokens.chunks(STRETCH.saturating_mul(size)).enumerate() {
        hashers.append(&stretch[..stretch.len() / size * size], block_size, at * STRETCH, out);
        each(out);
    }
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
    fn the_references_scheme_adds_to_the_seed() {
        let scheme = Scheme::Reference;
        let bytes = |block: [u32; 2]| block.map(u32::to_le_bytes).concat();
        let tokens = [1, 2, 3, 4];
        let plain = hashes(&tokens, Namespace { scheme, ..Default::default() });
        assert_eq!(plain, hashes(&tokens, Namespace::default()));
        let seed = 1337u64.wrapping_add(xxh3_64(b"lora"));
        let adapted = hashes(&tokens, Namespace { adapter: Some("lora"), scheme, ..Default::default() });
        assert_eq!(adapted, [[1, 2], [3, 4]].map(|block| xxh3_64_with_seed(&bytes(block), seed)));
        let salted = hashes(&tokens, Namespace { adapter: Some("lora"), salt: Some("s"), scheme });
        let root = seed.wrapping_add(xxh3_64_with_seed(b"s", 1));
        assert_eq!(salted, [xxh3_64_with_seed(&bytes([1, 2]), root), adapted[1]]);

        let identifier = format!("00000000000000ff{}", "0".repeat(48));
        let media =
            |_: usize| ["x", &identifier, "x"].map(|identifier| Media { offset: 1, identifier }).into_iter();
        let mut out = Vec::new();
        let namespace = Namespace { scheme, ..Default::default() };
        block_hashes(&[1, 2], BlockSize::new(2).unwrap(), &namespace, true, media, &mut out);
        let ids = [255, xxh3_64(b"x")];
        let block = [bytes([1, 2]), ids.map(u64::to_le_bytes).concat()].concat();
        assert_eq!(out, [BlockHash(xxh3_64_with_seed(&block, 1337))]);
    }

    #[test]
    fn blocks_beside_media_hash_as_they_do_alone() {
        let size = BlockSize::new(16).unwrap();
        let tokens: Vec<u32> = (0..16 * 9 + 5).collect();
        let item = Media { offset: 3, identifier: "picture" };
        for (salt, scheme) in
            [(None, Scheme::Kvlane), (Some("s"), Scheme::Kvlane), (Some("s"), Scheme::Reference)]
        {
            let namespace = Namespace { salt, scheme, adapter: Some("a") };
            for at_root in [true, false] {
                let with = |media: &dyn Fn(usize) -> Option<Media<'static>>| {
                    let mut out = Vec::new();
                    block_hashes(&tokens, size, &namespace, at_root, media, &mut out);
                    out
                };
                let bare = with(&|_| None);
                assert_eq!(bare.len(), 9);
                for seen in 0..9 {
                    let hashes = with(&|at| (at == seen).then_some(item));
                    for (at, hash) in hashes.iter().enumerate() {
                        assert_eq!(*hash == bare[at], at != seen, "block {at}, media in {seen}");
                    }
                }
            }
        }
    }

    #[test]
    fn stretches_hash_as_the_whole_does() {
        let size = BlockSize::new(8).unwrap();
        let namespace = Namespace { salt: Some("s"), ..Default::default() };
        for blocks in [0, 1, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH] {
            let tokens: Vec<u32> = (0..8 * blocks as u32 + 3).collect();
            let (mut whole, mut stretched, mut seen) = (Vec::new(), Vec::new(), 0);
            block_hashes(&tokens, size, &namespace, true, |_| [], &mut whole);
            prompt_hashes_in_stretches(&tokens, size, &namespace, &mut stretched, |out| seen = out.len());
            assert_eq!((&whole, whole.len()), (&stretched, seen));
        }
    }

    #[test]
    fn empty_adapter_and_salt_are_none() {
        let empty = Namespace { adapter: Some(""), salt: Some(""), ..Default::default() };
        assert_eq!(hashes(&[1, 2], empty), hashes(&[1, 2], Namespace::default()));
    }
}
