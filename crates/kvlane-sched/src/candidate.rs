//! A worker that might serve a request, with what the index knows of it for this prompt.

use kvlane_index::{Overlap, Worker};

/// What an engine said about its capacity; `None` = it did not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EngineLimits {
    /// Sequences that run at once (vLLM `max_num_seqs`).
    pub max_running: Option<u32>,
    /// Blocks in the device tier.
    pub kv_blocks: Option<u32>,
    /// Tokens computed in one step (vLLM `max_num_batched_tokens`).
    pub max_batched_tokens: Option<u32>,
}

/// What stays the same about a worker from request to request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Profile {
    /// Tokens in one of its blocks, at least 1.
    pub block_size_tokens: u32,
    /// Its capacity.
    pub limits: EngineLimits,
    /// Free labels, `key=value` (zone, rack, GPU kind).
    pub labels: Vec<Box<str>>,
}

impl Profile {
    /// A worker of which only the block size is known.
    pub const fn new(block_size_tokens: u32) -> Self {
        Self {
            block_size_tokens,
            limits: EngineLimits { max_running: None, kv_blocks: None, max_batched_tokens: None },
            labels: Vec::new(),
        }
    }

    /// Whether it has a label.
    pub fn has_label(&self, label: &str) -> bool {
        self.labels.iter().any(|l| **l == *label)
    }

    /// Tokens that the device tier holds, where the engine said so.
    pub fn kv_tokens(&self) -> Option<u64> {
        self.limits.kv_blocks.map(|b| u64::from(b) * u64::from(self.block_size_tokens))
    }
}

/// What a worker holds of the prompt, in tokens, each token at its cheapest source only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OverlapTokens {
    /// Leading tokens confirmed in device memory.
    pub device: u32,
    /// Further tokens predicted to be in device memory, beyond `device`.
    pub predicted: u32,
    /// Further tokens in host memory that continue the confirmed device run.
    pub host: u32,
    /// Further tokens on disk.
    pub disk: u32,
    /// Further tokens in external storage.
    pub external: u32,
}

impl OverlapTokens {
    /// From the index's answer, which counts blocks.
    ///
    /// A prediction and the lower tiers both continue from the confirmed device run, so a position may be in both: it is priced once, as
    /// predicted, which is the cheaper source.
    pub fn from_blocks(overlap: &Overlap, block_size_tokens: u32) -> Self {
        let tokens = |blocks: u32| blocks.saturating_mul(block_size_tokens);
        let mut covered = overlap.predicted.saturating_sub(overlap.device);
        let predicted = covered;
        let mut beyond = |blocks: u32| {
            let skipped = blocks.min(covered);
            covered -= skipped;
            tokens(blocks - skipped)
        };
        Self {
            device: tokens(overlap.device),
            predicted: tokens(predicted),
            host: beyond(overlap.host),
            disk: beyond(overlap.disk),
            external: beyond(overlap.external),
        }
    }

    /// All tokens that need not be computed.
    pub fn total(&self) -> u32 {
        self.device
            .saturating_add(self.predicted)
            .saturating_add(self.host)
            .saturating_add(self.disk)
            .saturating_add(self.external)
    }
}

/// Whether the adapter (LoRA) that a request asks for is in the worker's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Adapter {
    /// It asks for none.
    #[default]
    NotNeeded,
    /// It is there.
    Resident,
    /// The worker has to load it first.
    Absent,
}

/// A worker offered for one request. The caller offers only workers that serve the request's model and are healthy.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Who.
    pub worker: Worker,
    /// Its constant facts.
    pub profile: &'a Profile,
    /// What it holds of the prompt; all zero for a policy that is blind to the cache.
    pub overlap: OverlapTokens,
    /// How far `overlap` can be believed, 0 to 1: 1 = events applied and in step, less while a gap is being recovered, 0 = unknown.
    pub trust: f64,
    /// The request's adapter.
    pub adapter: Adapter,
    /// It finishes what it has and takes nothing new.
    pub draining: bool,
}

impl<'a> Candidate<'a> {
    /// A candidate that holds nothing of the prompt.
    pub const fn new(worker: Worker, profile: &'a Profile) -> Self {
        Self {
            worker,
            profile,
            overlap: OverlapTokens { device: 0, predicted: 0, host: 0, disk: 0, external: 0 },
            trust: 1.0,
            adapter: Adapter::NotNeeded,
            draining: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_priced_once() {
        let overlap = Overlap {
            worker: Worker::new(1, 0),
            device: 2,
            predicted: 5,
            host: 2,
            disk: 4,
            external: 1,
            mixed: 9,
        };
        // Predicted covers positions 2..5, host 2..4, disk 4..8: disk keeps 5..8.
        assert_eq!(
            OverlapTokens::from_blocks(&overlap, 16),
            OverlapTokens { device: 32, predicted: 48, host: 0, disk: 48, external: 16 }
        );
    }
}
