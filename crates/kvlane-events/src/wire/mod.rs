//! What engines say on the wire, whatever the engine and its version.
//!
//! One file per engine holds its version table and its peculiarities ([`vllm`], [`sglang`], [`trtllm`]); the positional
//! and the keyed encoding that they share are read in `fields`. Wire types stop here: the rest of the router sees
//! [`kvlane_index::KvEvent`]s (see [`crate::resolve`]).
//!
//! Nothing is dropped without a [`DropReason`]. An element that cannot be used costs that event only; bytes that are not
//! MessagePack, or not a batch, cost the batch, and the stream treats it as a hole.

pub mod drain;
mod fields;
pub mod sglang;
mod spare;
pub mod trtllm;
pub mod vllm;

use crate::msgpack::{Malformed, Reader};
use kvlane_index::{EngineHash, GroupId, GroupKind, Tier};
use spare::Spare;
use std::borrow::Cow;

/// Which engine a publisher belongs to: decides how wide hashes are cut and what nameless strings mean.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EngineKind {
    /// vLLM, and whatever speaks through its publisher (LMCache, the mock engine).
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM, streaming or republished.
    TrtLlm,
}

/// One published batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Batch<'a> {
    /// The engine's clock when it published: seconds since the Unix epoch.
    pub ts_s: f64,
    /// The data-parallel rank as the payload names it. The socket's rank is to be preferred.
    pub dp_rank: Option<u32>,
    /// The events, in the order in which they must be applied.
    pub events: Vec<WireEvent<'a>>,
    /// Why events of this batch are missing from `events`, one entry each.
    pub dropped: Vec<DropReason>,
    /// Events whose medium has no known tier; they are kept as [`Tier::External`].
    pub unknown_media: u32,
}

/// One event of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WireEvent<'a> {
    /// Blocks entered the cache.
    Stored(Stored<'a>),
    /// Blocks left it.
    Removed(Removed),
    /// Everything left it.
    Cleared,
}

/// `BlockStored`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored<'a> {
    /// The blocks; may be empty, and may be fewer than `tokens` span.
    pub hashes: Vec<EngineHash>,
    /// The block before the first; `None` = the root of a prompt.
    pub parent: Option<EngineHash>,
    /// Token ids of the whole range; empty in an offload placeholder. Of an EAGLE pair: the first token.
    pub tokens: Vec<u32>,
    /// Tokens in a block; 0 = unsaid.
    pub block_size: u32,
    /// Where the blocks are.
    pub tier: Tier,
    /// The KV-cache group's number.
    pub group: GroupId,
    /// What kind of attention the group serves; `None` = unsaid (older engines).
    pub group_kind: Option<GroupKind>,
    /// The LoRA adapter's name.
    pub adapter: Option<Cow<'a, str>>,
    /// The request's cache salt. Engines name it for the first block of a prompt only.
    pub salt: Option<Cow<'a, str>>,
    /// Media items, sorted by block.
    pub media: Vec<BlockMedia<'a>>,
}

/// A media item (or anything else beside tokens) that is part of a block's identity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockMedia<'a> {
    /// Index of the block within the event.
    pub block: u32,
    /// First token of the item relative to the block's first token; negative if it began before.
    pub offset: i64,
    /// The engine's identifier.
    pub identifier: Cow<'a, str>,
}

/// `BlockRemoved`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Removed {
    /// The blocks, in no order.
    pub hashes: Vec<EngineHash>,
    /// The tier that they left.
    pub tier: Tier,
    /// The KV-cache group's number.
    pub group: GroupId,
}

/// Why something that an engine said was not used.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DropReason {
    /// The payload is not MessagePack or is cut short: the whole batch.
    Malformed,
    /// MessagePack, but not `[ts, events, rank?]`: the whole batch.
    NotABatch,
    /// The event's tag is none that we know.
    UnknownEvent,
    /// A field that cannot be done without is missing or of a wrong type.
    BadField,
    /// A removal could not be read: something may be claimed that is gone.
    BadRemoval,
    /// The event's block size neither equals nor is a multiple of the worker's.
    BlockSize,
    /// Less than a whole block.
    PartialBlock,
    /// A KV-cache group that serves no prefix (cross or encoder-only attention), or a small window of several.
    IgnoredGroup,
    /// A message with a wrong number of frames or a sequence number that is not 8 bytes.
    BadFrames,
    /// The topic is another publisher's.
    OtherTopic,
    /// Seen before: the live stream overlaps a replay, or a reply came twice.
    Duplicate,
    /// An answer to a replay request that was given up.
    LateReply,
    /// Left over from an earlier life of the publisher.
    EarlierLife,
    /// The buffer of live batches was full while a replay ran; the batch will be asked for again.
    BufferFull,
}

impl DropReason {
    /// All reasons, for counters.
    pub const ALL: [Self; 14] = [
        Self::Malformed,
        Self::NotABatch,
        Self::UnknownEvent,
        Self::BadField,
        Self::BadRemoval,
        Self::BlockSize,
        Self::PartialBlock,
        Self::IgnoredGroup,
        Self::BadFrames,
        Self::OtherTopic,
        Self::Duplicate,
        Self::LateReply,
        Self::EarlierLife,
        Self::BufferFull,
    ];

    /// The label used in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NotABatch => "not_a_batch",
            Self::UnknownEvent => "unknown_event",
            Self::BadField => "bad_field",
            Self::BadRemoval => "bad_removal",
            Self::BlockSize => "block_size",
            Self::PartialBlock => "partial_block",
            Self::IgnoredGroup => "ignored_group",
            Self::BadFrames => "bad_frames",
            Self::OtherTopic => "other_topic",
            Self::Duplicate => "duplicate",
            Self::LateReply => "late_reply",
            Self::EarlierLife => "earlier_life",
            Self::BufferFull => "buffer_full",
        }
    }
}

impl From<Malformed> for DropReason {
    fn from(Malformed: Malformed) -> Self {
        Self::Malformed
    }
}

/// Decodes the payloads of a publisher one after another, with memory that it uses again.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    spare: Spare,
}

impl Decoder {
    /// Decodes one payload.
    ///
    /// Errors mean that the whole batch is unusable ([`DropReason::Malformed`], [`DropReason::NotABatch`]). Never panics;
    /// memory is bounded by the payload's size.
    pub fn decode<'a>(&mut self, engine: EngineKind, payload: &'a [u8]) -> Result<Batch<'a>, DropReason> {
        let mut reader = Reader::new(payload);
        let len = reader.array()?.ok_or(DropReason::NotABatch)?;
        if len < 2 {
            return Err(DropReason::NotABatch);
        }
        let ts_s = reader.number()?.ok_or(DropReason::NotABatch)?;
        let count = reader.array()?.ok_or(DropReason::NotABatch)?;
        let mut batch = Batch {
            ts_s,
            dp_rank: None,
            events: Vec::with_capacity(count.min(64)),
            dropped: Vec::new(),
            unknown_media: 0,
        };
        for _ in 0..count {
            let start = reader;
            match fields::read_event(engine, &mut self.spare, &mut reader, &mut batch.unknown_media) {
                Ok(event) => batch.events.push(event),
                Err(DropReason::Malformed) => return Err(DropReason::Malformed),
                Err(reason) => {
                    reader = start;
                    reader.skip()?;
                    batch.dropped.push(reason);
                }
            }
        }
        for i in 2..len {
            match reader.int()? {
                Some(rank) if i == 2 => batch.dp_rank = u32::try_from(rank.bits()).ok(),
                Some(_) => {}
                None => reader.skip()?,
            }
        }
        Ok(batch)
    }

    /// Takes back a batch that is done with, for the next ones to be made of. Without it they are made anew.
    pub fn recycle(&mut self, batch: Batch<'_>) {
        self.spare.take(batch);
    }
}

/// [`Decoder::decode`] of a single payload.
pub fn decode(engine: EngineKind, payload: &[u8]) -> Result<Batch<'_>, DropReason> {
    Decoder::default().decode(engine, payload)
}

/// When a batch was published (seconds since the Unix epoch), without decoding the rest; `None` if it is not a batch.
pub(crate) fn published_s(payload: &[u8]) -> Option<f64> {
    let mut reader = Reader::new(payload);
    reader.array().ok()??;
    reader.number().ok()?
}

/// The tier that an engine's `medium` names, case-insensitively; `None` for a name that we do not know.
pub fn tier_of_medium(medium: &str) -> Option<Tier> {
    const NAMES: [(&str, Tier); 17] = [
        ("GPU", Tier::Device),
        ("DEVICE", Tier::Device),
        ("NONE", Tier::Device),
        ("CPU", Tier::Host),
        ("CPU_PINNED", Tier::Host),
        ("CPU_TIER1", Tier::Host),
        ("HOST", Tier::Host),
        ("CPU_TIER2", Tier::Disk),
        ("DISK", Tier::Disk),
        ("NVME", Tier::Disk),
        ("FS", Tier::Disk),
        ("STORAGE", Tier::Disk),
        ("OBJ", Tier::External),
        ("EXTERNAL", Tier::External),
        ("NETWORK", Tier::External),
        ("REMOTE", Tier::External),
        ("SHARED", Tier::External),
    ];
    NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(medium)).map(|&(_, tier)| tier)
}
