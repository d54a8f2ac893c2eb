//! What is known already of a text's tokens: a conversation is tokenized once, however often it comes back.
//!
//! # Where a text may be cut
//!
//! A tokenizer first finds its added tokens in the raw text, leftmost and longest first; what lies between two of them is
//! normalized, pre-tokenized and encoded by itself. So the tokens up to the end of an added token's match do not depend on
//! what follows, and those after it depend on what precedes only through that one token. [`Cuts`] repeats
//! the first step and cuts after matches; each segment is then tokenized behind the token that ended the one before, whose own id is
//! dropped again. That keeps every influence across the cut that tokenizers know: stripped blanks, "single word"
//! checks, and a prefix that only the first word gets. Left out as cuts are tokens matched after normalization (their
//! matches are not in the raw text) and single-word tokens (whether they match depends on the next character).
//!
//! Most chat templates end every message with such a token. Where there is none for long (a pasted document, a completion, a template of plain words),
//! byte-level tokenizers have a second kind of cut: the *seam*, between a letter of `a` to `z` and a blank with another such letter behind it. No word
//! reaches across one, which is proven for each tokenizer when it is loaded (`ByteLevel::has_seams`), and no influence either, so that a segment
//! behind a seam is tokenized as if it were the whole text. Of other tokenizers a text without added tokens is one segment: known again only as a whole.
//!
//! # What is kept
//!
//! Segments, by content, not conversations: forks, edits and retries share what they have in common, and a system
//! prompt is held once. The text is kept with the tokens and compared, so equal hashes cannot mix two texts up.
//! Recently used segments stay (second chance); the bound counts text, tokens and a segment's own overhead.
//!
//! # Names of prefixes
//!
//! Whoever derives something from leading tokens (block hashes, say) can keep it, too: each segment has a number of its own, never used again, and the
//! numbers of a text's first segments, chained, are the name of the tokens so far ([`Prefix`]). Equal names mean equal tokens; a segment that was
//! dropped and tokenized again has another number, so that its prefixes are unknown and nothing is wrong.
//!
//! # Consistency
//!
//! Shared by all threads. Shards are by content; a hit takes a shard's lock shared, for a look-up and an `Arc` clone, and the texts are
//! compared after it is released. Two threads that miss the same segment both tokenize it; the later one's entry stays.

use crate::error::Unroutable;
use aho_corasick::{AhoCorasick, MatchKind};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

/// Shortest segment, in bytes: below it a look-up costs as much as it saves.
const MIN_SEGMENT_BYTES: usize = 64;

/// A segment that is longer than this ends at the next seam: short enough that little is tokenized again behind a change, and long enough that
/// looking up is a hundred times cheaper than tokenizing.
const SEAM_BYTES: usize = 2048;

/// What a segment costs besides its text and tokens: entry, map slot, ring slot.
const SEGMENT_OVERHEAD_BYTES: usize = 160;

/// Independent locks. A power of two.
const SHARDS: usize = 32;

/// A token after which a text may be cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CutToken {
    pub(crate) id: u32,
    pub(crate) text: String,
}

/// Finds where a text may be cut.
#[derive(Clone, Debug)]
pub(crate) struct Cuts {
    /// All added tokens that are matched in raw text; those that are no cuts still take their place.
    finder: Option<AhoCorasick>,
    /// For each pattern of the finder, the token if it is a cut.
    tokens: Vec<Option<CutToken>>,
    /// A segment of so many bytes ends at the next seam; `None`: there are no seams.
    seam_bytes: Option<usize>,
}

impl Cuts {
    /// The cuts of a tokenizer with these added tokens; `seams`: it is byte-level, and its words end at seams.
    pub(crate) fn new(added: &[(u32, tokenizers::AddedToken)], seams: bool) -> Self {
        let raw: Vec<_> = added.iter().filter(|(_, t)| !t.normalized && !t.content.is_empty()).collect();
        let tokens = raw
            .iter()
            .map(|(id, t)| (!t.single_word).then(|| CutToken { id: *id, text: t.content.clone() }))
            .collect();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(raw.iter().map(|(_, t)| &t.content))
            .ok();
        Self { finder, tokens, seam_bytes: seams.then_some(SEAM_BYTES) }
    }

    /// The segments of `text`, in order and without gaps, each with the token that ended the one before it (none if that was a seam).
    fn segments<'t>(&'t self, text: &'t str) -> impl Iterator<Item = (Option<&'t CutToken>, &'t str)> {
        let mut matches = self.finder.as_ref().map(|finder| finder.find_iter(text));
        let mut next_token = move |start: usize| {
            let found = matches.as_mut()?.find_map(|found| {
                let token = self.tokens[found.pattern().as_usize()].as_ref()?;
                (found.end() - start >= MIN_SEGMENT_BYTES).then_some((found.end(), token))
            });
            if found.is_none() {
                matches = None;
            }
            found
        };
        let (mut start, mut before) = (0, None);
        let mut next = next_token(0);
        std::iter::from_fn(move || {
            let end = next.map_or(text.len(), |(end, _)| end);
            let segment = match self.seam_bytes.and_then(|bytes| seam(text, start + bytes, end)) {
                Some(seam) => {
                    let segment = (before, &text[start..seam]);
                    (start, before) = (seam, None);
                    segment
                }
                None if start == text.len() => return None,
                None => {
                    let segment = (before, &text[start..end]);
                    (start, before) = (end, next.map(|(_, token)| token));
                    next = next_token(start);
                    segment
                }
            };
            Some(segment)
        })
    }
}

/// The first seam from `from` on that is not close to `end`.
fn seam(text: &str, from: usize, end: usize) -> Option<usize> {
    let around = text.as_bytes().get(from - 1..end.checked_sub(MIN_SEGMENT_BYTES)?)?;
    let is_seam = |at: &[u8]| at[0].is_ascii_lowercase() && at[1] == b' ' && at[2].is_ascii_lowercase();
    around.windows(3).position(is_seam).map(|at| from + at)
}

/// Leading tokens of a prompt, under a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefix {
    /// How many of the prompt's tokens it spans.
    pub tokens: usize,
    /// Equal ids, of whatever model, mean equal tokens (but for two chains of numbers that happen to hash alike, odds of 2^-128). Not stable:
    /// the same tokens may have another id later.
    pub id: u128,
}

impl Prefix {
    /// Before any token; `kind` tells apart what may stand before a text.
    pub(crate) fn empty(kind: u64) -> Self {
        Self { tokens: 0, id: xxh3_128(&kind.to_le_bytes()) }
    }

    /// With the segment of this number behind it, up to `tokens` tokens.
    fn then(self, number: u64, tokens: usize) -> Self {
        let mut chain = [0; 24];
        chain[..16].copy_from_slice(&self.id.to_le_bytes());
        chain[16..].copy_from_slice(&number.to_le_bytes());
        Self { tokens, id: xxh3_128(&chain) }
    }
}

/// A text's tokens, and what is known of their beginnings.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Known {
    pub(crate) tokens: Vec<u32>,
    /// How many of the leading ones were known before.
    pub(crate) known: usize,
    /// The prefixes that end with a segment, shortest first.
    pub(crate) prefixes: Vec<Prefix>,
}

/// Counts of a [`PrefixCache`], from its start on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheStats {
    /// Bytes held now.
    pub bytes: u64,
    /// Segments held now.
    pub segments: u64,
    /// Bytes of text whose tokens were known.
    pub hit_bytes: u64,
    /// Bytes of text that had to be tokenized.
    pub miss_bytes: u64,
    /// Segments dropped to make room.
    pub evicted: u64,
}

/// Tokens of known segments of text. See the module's documentation.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    shards: Box<[RwLock<Shard>]>,
    /// Most bytes in one shard.
    shard_bytes: usize,
    hit_bytes: AtomicU64,
    miss_bytes: AtomicU64,
    evicted: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    by_hash: HashMap<u64, Arc<Segment>, BuildHasherDefault<Identity>>,
    /// Every hash once, oldest first; a segment in use goes to the back again instead of out.
    ring: VecDeque<u64>,
    bytes: usize,
}

/// Counts segments, over all caches of the process.
static NUMBERS: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct Segment {
    number: u64,
    before: Option<u32>,
    text: Box<str>,
    tokens: Box<[u32]>,
    used: AtomicBool,
}

impl Segment {
    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.tokens) + SEGMENT_OVERHEAD_BYTES
    }
}

impl PrefixCache {
    /// An empty cache that holds at most `bytes`.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            shard_bytes: bytes / SHARDS,
            hit_bytes: AtomicU64::new(0),
            miss_bytes: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    /// The tokens of `text`, with those of `before` in front of them. `encode` tokenizes what is not known: the text of a
    /// segment, which begins with the given token if there is one. `None`: more than `new_bytes_max` are not known; what was
    /// tokenized up to there is kept.
    pub(crate) fn tokens(
        &self,
        cuts: &Cuts,
        text: &str,
        before: &[u32],
        new_bytes_max: usize,
        mut encode: impl FnMut(&str) -> Result<Vec<u32>, Unroutable>,
    ) -> Result<Option<Known>, Unroutable> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + before.len());
        tokens.extend_from_slice(before);
        let mut prefixes: Vec<Prefix> = Vec::new();
        let mut prefix = Prefix::empty(u64::from(!before.is_empty()));
        let (mut known, mut all_known) = (0, true);
        let (mut hit_bytes, mut miss_bytes) = (0, 0);
        for (before, segment) in cuts.segments(text) {
            let id = before.map(|token| token.id);
            let hash = xxh3_64_with_seed(segment.as_bytes(), id.map_or(0, |id| u64::from(id) + 1));
            if let Some(found) = self.get(hash, id, segment) {
                tokens.extend_from_slice(&found.tokens);
                hit_bytes += segment.len();
                if all_known {
                    known = tokens.len();
                }
                prefix = prefix.then(found.number, tokens.len());
                prefixes.push(prefix);
                continue;
            }
            all_known = false;
            if miss_bytes + segment.len() > new_bytes_max {
                self.miss_bytes.fetch_add(miss_bytes as u64, Ordering::Relaxed);
                return Ok(None);
            }
            miss_bytes += segment.len();
            let start = tokens.len();
            match before {
                None => tokens.extend(encode(segment)?),
                Some(token) => {
                    let encoded = encode(&[&token.text, segment].concat())?;
                    let (first, rest) = encoded.split_first().ok_or(Unroutable::TokenizerFailed)?;
                    debug_assert_eq!(*first, token.id, "an added token at the start of a text is one token");
                    tokens.extend_from_slice(rest);
                }
            }
            let number = self.insert(hash, id, segment, &tokens[start..]);
            prefix = prefix.then(number, tokens.len());
            prefixes.push(prefix);
        }
        self.hit_bytes.fetch_add(hit_bytes as u64, Ordering::Relaxed);
        self.miss_bytes.fetch_add(miss_bytes as u64, Ordering::Relaxed);
        Ok(Some(Known { tokens, known, prefixes }))
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let mut stats = CacheStats {
            hit_bytes: self.hit_bytes.load(Ordering::Relaxed),
            miss_bytes: self.miss_bytes.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
            ..CacheStats::default()
        };
        for shard in &self.shards {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            stats.bytes += shard.bytes as u64;
            stats.segments += shard.by_hash.len() as u64;
        }
        stats
    }

    /// The high bits choose the shard, the map inside it goes by the low ones.
    fn shard(&self, hash: u64) -> &RwLock<Shard> {
        &self.shards[(hash >> 32) as usize % SHARDS]
    }

    fn get(&self, hash: u64, before: Option<u32>, text: &str) -> Option<Arc<Segment>> {
        let found = {
            let shard = self.shard(hash).read().unwrap_or_else(PoisonError::into_inner);
            shard.by_hash.get(&hash)?.clone()
        };
        if found.before != before || *found.text != *text {
            return None;
        }
        // Only the first use since the last sweep writes, so that a hot segment is not passed between caches.
        if !found.used.load(Ordering::Relaxed) {
            found.used.store(true, Ordering::Relaxed);
        }
        Some(found)
    }

    /// Keeps a segment, if there is room for it, and returns its number.
    fn insert(&self, hash: u64, before: Option<u32>, text: &str, tokens: &[u32]) -> u64 {
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let segment = Arc::new(Segment {
            number,
            before,
            text: text.into(),
            tokens: tokens.into(),
            used: AtomicBool::new(false),
        });
        let bytes = segment.bytes();
        // One text must not push out all others.
        if bytes > self.shard_bytes / 2 {
            return number;
        }
        let mut evicted = 0;
        let mut shard = self.shard(hash).write().unwrap_or_else(PoisonError::into_inner);
        match shard.by_hash.insert(hash, segment) {
            Some(replaced) => shard.bytes -= replaced.bytes(),
            None => shard.ring.push_back(hash),
        }
        shard.bytes += bytes;
        while shard.bytes > self.shard_bytes {
            let oldest = shard.ring.pop_front().expect("a shard over its bound holds a segment");
            let segment = &shard.by_hash[&oldest];
            if oldest == hash || segment.used.swap(false, Ordering::Relaxed) {
                shard.ring.push_back(oldest);
                continue;
            }
            shard.bytes -= segment.bytes();
            shard.by_hash.remove(&oldest);
            evicted += 1;
        }
        drop(shard);
        self.evicted.fetch_add(evicted, Ordering::Relaxed);
        number
    }
}

/// The key is a hash already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
pub(crate) mod random;
#[cfg(test)]
mod tests;
