//! From what an engine said to what the index applies: block hashes, groups, block sizes, order inside a batch.
//!
//! * Tokens are hashed with [`kvlane_index::hash::block_hashes`] in steps of the worker's block size; a salt counts in the
//!   first block of a prompt, the adapter in all, media in the blocks that hold them.
//! * Events of sliding-window and recurrent groups do not say *which* blocks of their range they list, and offload
//!   placeholders carry no tokens: both become [`KvEvent::StoredByHash`]. An empty list is kept as such, since it says that the
//!   group exists. Engines publish them before the full group's event of the same step, so they are held back until the end
//!   of the batch, or until a removal of their group or a clear would overtake them.
//! * A publisher may use larger blocks in another tier (LMCache's chunks). Such a block becomes several of the worker's: the
//!   last keeps its engine hash, so that children find their parent; the others get names derived from it, and a removal
//!   names all of them.

use crate::wire::{Batch, DropReason, Removed, Stored, WireEvent};
use kvlane_index::hash::{Media, Namespace, Scheme, block_hashes};
use kvlane_index::{BlockHash, BlockSize, EngineHash, Group, GroupKind, KvEvent, StoredBlock, Tier};

/// At most this many pairs of a tier and a ratio of block sizes are remembered; events with more are dropped.
const MAX_RATIOS: usize = 4;

/// A publisher's block is at most this many of ours.
const MAX_RATIO: u32 = 256;

/// At most this many names in one removal once larger blocks are taken apart.
const MAX_REMOVED: usize = 1 << 20;

/// Turns the batches of one publisher into index events.
#[derive(Clone, Debug)]
pub struct Resolver {
    block_size: BlockSize,
    scheme: Scheme,
    /// Ratios above 1 of an event's block size to ours, as seen so far in each tier: removals do not say theirs.
    ratios: Vec<(Tier, u32)>,
    hashes: Vec<BlockHash>,
}

impl Resolver {
    /// For a worker whose requests are hashed in blocks of `block_size`.
    pub fn new(block_size: BlockSize) -> Self {
        Self { block_size, scheme: Scheme::default(), ratios: Vec::new(), hashes: Vec::new() }
    }

    /// The same, hashing by other rules than kvlane's own.
    #[must_use]
    pub fn hashing_as(self, scheme: Scheme) -> Self {
        Self { scheme, ..self }
    }

    /// Appends the events of `batch` to `out`, in the order in which they must be applied, and the reasons why some are
    /// missing to `dropped` (those of the batch itself not included).
    pub fn resolve(&mut self, batch: &Batch<'_>, out: &mut Vec<KvEvent>, dropped: &mut Vec<DropReason>) {
        let mut held: Vec<KvEvent> = Vec::new();
        for event in &batch.events {
            match event {
                WireEvent::Cleared => {
                    out.append(&mut held);
                    out.push(KvEvent::Cleared { tier: None });
                }
                WireEvent::Removed(removed) => {
                    release(&mut held, removed, out);
                    match self.removed(removed) {
                        Ok(event) => out.push(event),
                        Err(reason) => dropped.push(reason),
                    }
                }
                WireEvent::Stored(stored) => match self.stored(stored) {
                    Ok(Some(event @ KvEvent::StoredByHash { .. })) => held.push(event),
                    Ok(Some(event)) => out.push(event),
                    Ok(None) => {}
                    Err(reason) => dropped.push(reason),
                },
            }
        }
        out.append(&mut held);
    }

    fn removed(&self, removed: &Removed) -> Result<KvEvent, DropReason> {
        let mut hashes = removed.hashes.clone();
        for &(_, ratio) in self.ratios.iter().filter(|(tier, _)| *tier == removed.tier) {
            let parts = ratio - 1;
            if hashes.len() + removed.hashes.len() * parts as usize > MAX_REMOVED {
                return Err(DropReason::BadRemoval);
            }
            for &hash in &removed.hashes {
                hashes.extend((0..parts).map(|part| part_of(hash, part)));
            }
        }
        Ok(KvEvent::Removed { tier: removed.tier, group: removed.group, hashes })
    }

    fn stored(&mut self, stored: &Stored<'_>) -> Result<Option<KvEvent>, DropReason> {
        let spanned = stored.hashes.len() as u64 * u64::from(stored.block_size);
        // Engines before vLLM 0.22.1 number their groups without saying the kind; one that lists fewer blocks than
        // it spans keeps only the end.
        let kind = match stored.group_kind {
            Some(kind) => kind,
            None if spanned + u64::from(stored.block_size) <= stored.tokens.len() as u64
                && stored.group.0 != 0 =>
            {
                GroupKind::Recurrent
            }
            None => GroupKind::Full,
        };
        let group = Group { id: stored.group, kind };
        if kind != GroupKind::Full || (stored.tokens.is_empty() && !stored.hashes.is_empty()) {
            return Ok(Some(KvEvent::StoredByHash {
                tier: stored.tier,
                group,
                hashes: stored.hashes.clone(),
            }));
        }
        if stored.hashes.is_empty() {
            return Ok(None);
        }
        let ratio = self.ratio(stored.block_size)?;
        let blocks = self.blocks(stored, ratio)?;
        self.remember_ratio(stored.tier, ratio)?;
        Ok(Some(KvEvent::Stored { tier: stored.tier, group, parent: stored.parent, blocks }))
    }

    /// How many of our blocks one of the event's is.
    fn ratio(&self, block_size: u32) -> Result<u32, DropReason> {
        let ours = self.block_size.tokens();
        if block_size != 0 && block_size < ours {
            return Err(DropReason::PartialBlock);
        }
        if block_size == 0 || !block_size.is_multiple_of(ours) || block_size / ours > MAX_RATIO {
            return Err(DropReason::BlockSize);
        }
        Ok(block_size / ours)
    }

    fn remember_ratio(&mut self, tier: Tier, ratio: u32) -> Result<(), DropReason> {
        if ratio > 1 && !self.ratios.contains(&(tier, ratio)) {
            if self.ratios.len() == MAX_RATIOS {
                return Err(DropReason::BlockSize);
            }
            self.ratios.push((tier, ratio));
        }
        Ok(())
    }

    fn blocks(&mut self, stored: &Stored<'_>, ratio: u32) -> Result<Vec<StoredBlock>, DropReason> {
        let namespace = Namespace {
            adapter: stored.adapter.as_deref(),
            salt: stored.salt.as_deref(),
            scheme: self.scheme,
        };
        self.hashes.clear();
        let items = stored.media.as_slice();
        // Media offsets are relative to the event's block; ours are relative to the part that the item falls into.
        let part_tokens = i64::from(self.block_size.tokens());
        let media = |i: usize| {
            let (theirs, part) = (i / ratio as usize, i % ratio as usize);
            let of_block = items.partition_point(|m| (m.block as usize) < theirs);
            let of_block = items[of_block..].iter().take_while(move |m| m.block as usize == theirs);
            of_block.map(move |m| Media {
                offset: m.offset - part as i64 * part_tokens,
                identifier: &m.identifier,
            })
        };
        let at_root = stored.parent.is_none();
        // More tokens than the hashes span: a full group lists its blocks from the start of the range.
        let spanned = stored.hashes.len() * ratio as usize * self.block_size.tokens() as usize;
        let tokens = &stored.tokens[..stored.tokens.len().min(spanned)];
        block_hashes(tokens, self.block_size, &namespace, at_root, media, &mut self.hashes);
        let whole = self.hashes.len() / ratio as usize;
        if whole == 0 {
            return Err(DropReason::PartialBlock);
        }
        let mut blocks = Vec::with_capacity(whole * ratio as usize);
        for (&engine, parts) in stored.hashes.iter().zip(self.hashes.chunks_exact(ratio as usize)) {
            for (part, &block) in (0..).zip(parts) {
                let engine = if part + 1 == ratio { engine } else { part_of(engine, part) };
                blocks.push(StoredBlock { engine, block });
            }
        }
        Ok(blocks)
    }
}

/// Lets out the held events that `removed` would overtake.
fn release(held: &mut Vec<KvEvent>, removed: &Removed, out: &mut Vec<KvEvent>) {
    let overtaken =
        |event: &KvEvent| matches!(event, KvEvent::StoredByHash { group, .. } if group.id == removed.group);
    if held.iter().any(overtaken) {
        out.append(held);
    }
}

/// The name of the `part`-th of our blocks inside an engine's larger block (all but its last).
fn part_of(hash: EngineHash, part: u32) -> EngineHash {
    // A finaliser of splitmix64 over both: parts of one block, and of different blocks, do not meet by chance.
    let mut z = hash.0 ^ (u64::from(part) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    EngineHash(z ^ (z >> 31))
}
