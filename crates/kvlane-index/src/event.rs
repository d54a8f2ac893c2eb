//! What can happen to one worker's cache.
//!
//! Engine events, a worker's loss, replayed gaps and restored snapshots all arrive as a [`KvEvent`], in one
//! ordered lane per worker; the index has one `apply` for them. Predicted placements are no events: they have
//! a call of their own, because no engine said them.

use crate::Tier;

/// The content of one block, without its prefix: XXH3-64 over its token ids (see [`crate::hash`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockHash(pub u64);

/// The id that an engine printed for a block in its prefix; a handle without meaning outside one worker.
///
/// Wider hashes are cut to 64 bits by the decoder, the same way in every event of a worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EngineHash(pub u64);

/// Number of a KV-cache group inside an engine: layers that share one kind of cache. 0 where unsaid.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GroupId(pub u16);

/// How much of a prefix a KV-cache group needs for a hit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum GroupKind {
    /// Full or MLA attention: every block of the prefix.
    #[default]
    Full,
    /// Sliding-window attention: the last `window_tokens - 1` tokens before the end of the hit.
    Sliding {
        /// The window, in tokens.
        window_tokens: u32,
    },
    /// Mamba and other recurrent state: the one block that ends the hit.
    Recurrent,
}

/// A KV-cache group as an event names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Group {
    /// Which group of the engine.
    pub id: GroupId,
    /// What a hit needs of it.
    pub kind: GroupKind,
}

/// One full block as an engine stored it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StoredBlock {
    /// The engine's name for it.
    pub engine: EngineHash,
    /// Its content.
    pub block: BlockHash,
}

/// A change of one worker's cache, in the order in which its engine made it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvEvent {
    /// A chain of blocks entered a tier: the first follows `parent`, each other one its predecessor.
    Stored {
        /// Where.
        tier: Tier,
        /// For which KV-cache group.
        group: Group,
        /// The block before the first; `None` = the first block of a prompt.
        parent: Option<EngineHash>,
        /// The chain, never empty.
        blocks: Vec<StoredBlock>,
    },
    /// Blocks entered a tier whose content the event does not carry (sliding-window groups, offload
    /// placeholders): they take the position of the block that the worker holds under the same engine hash.
    StoredByHash {
        /// Where.
        tier: Tier,
        /// For which KV-cache group.
        group: Group,
        /// The blocks, in no order.
        hashes: Vec<EngineHash>,
    },
    /// One copy of each of these blocks left a tier.
    Removed {
        /// Where.
        tier: Tier,
        /// For which KV-cache group.
        group: GroupId,
        /// The blocks, in no order.
        hashes: Vec<EngineHash>,
    },
    /// Everything that the worker held is gone, in one tier or (`None`) in all.
    Cleared {
        /// The tier that was emptied.
        tier: Option<Tier>,
    },
}
