//! Settings of one partition, and what it reports about itself.

use crate::{BlockSize, Group, Tier, Worker};

/// Settings of one partition: one model family and one block size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexConfig {
    /// Tokens in a block, equal for all workers of the partition.
    pub block_size: BlockSize,
    /// Secret of the prefix hash. Give it fresh random bits in each process, so that nobody can prepare prompts whose
    /// prefixes collide; a fixed value makes runs repeatable. It never leaves the process.
    pub prefix_key: u64,
    /// Bytes that the partition may use; `None` = no bound. Above it, predictions are shed first, then the coldest blocks of
    /// lower tiers, then the coldest of the device tier. Looked at every 64 events, so it may be exceeded by those.
    pub budget_bytes: Option<u64>,
    /// Orphan blocks kept for each rank, waiting for their parent; more are refused. Their paths may take 256 bytes for each that is
    /// allowed, on average: so this bounds bytes too, about 400 for each.
    pub max_orphans: u32,
    /// How long an orphan that is not stored again waits for its parent, in milliseconds of the time that [`Index::expire`](crate::Index::expire)
    /// is told (counted from the first call after it was stored); then it is dropped, and counted by that call.
    pub max_orphan_age_ms: u64,
}

impl IndexConfig {
    /// Defaults for `block_size`: no budget, a fixed prefix key, 65,536 orphans a rank for ten minutes.
    pub const fn new(block_size: BlockSize) -> Self {
        Self {
            block_size,
            prefix_key: 0x9e37_79b9_7f4a_7c15,
            budget_bytes: None,
            max_orphans: 1 << 16,
            max_orphan_age_ms: 600_000,
        }
    }
}

/// What one worker holds in one tier and KV-cache group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Who.
    pub worker: Worker,
    /// Where.
    pub tier: Tier,
    /// For which group.
    pub group: Group,
    /// Engine hashes held, orphans included; a second copy counts once.
    pub blocks: u64,
}

/// Figures of one partition, exact at the moment of the call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexStats {
    /// Worker ranks known.
    pub workers: u64,
    /// (rank, tier, group, engine hash) pairs held, orphans included.
    pub pairs: u64,
    /// Distinct places in prompts that are kept: blocks of the prefix tree.
    pub places: u64,
    /// Compressed runs that the places form.
    pub runs: u64,
    /// Engine hashes waiting for their parent.
    pub orphans: u64,
    /// (tier, group, engine hash) pairs of orphans dropped for their age, since the beginning.
    pub orphans_expired: u64,
    /// Predicted (rank, block) pairs alive.
    pub predicted: u64,
    /// Bytes in use.
    pub bytes: u64,
}
