//! The cost of the reference system with the defaults of its release 1.6.1, for comparison.
//!
//! ```text
//! cost = max(0, (active prefill tokens + prompt) / block size - overlap) + active blocks + the prompt's blocks that are not active there
//! overlap = device + 0.75 host + 0.25 (disk + external), in blocks
//! ```
//!
//! Everything is a block: one to be computed weighs as much as one that lies there while its request decodes.

use super::{Policy, Task, View};
use crate::decision::Row;

/// Prefill and decode blocks, unweighted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

const HOST_CREDIT: f64 = 0.75;
const DISK_CREDIT: f64 = 0.25;

impl Policy for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn needs_cache_knowledge(&self) -> bool {
        true
    }

    fn unit(&self) -> &'static str {
        "blocks"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["prefill", "decode"]
    }

    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row) {
        let block = f64::from(view.candidate.profile.block_size_tokens.max(1));
        let overlap = &view.candidate.overlap;
        let credit_tokens = f64::from(overlap.device + overlap.predicted)
            + HOST_CREDIT * f64::from(overlap.host)
            + DISK_CREDIT * (f64::from(overlap.disk) + f64::from(overlap.external));
        row.cached_tokens = (credit_tokens.round() as u32).min(task.prompt_tokens);
        let raw_blocks = (row.load.prefill_tokens as f64 + f64::from(task.prompt_tokens)) / block;
        row.terms[0] = (raw_blocks - credit_tokens / block).max(0.0);

        let request = task.request;
        let shared =
            view.ledger.held_blocks(row.worker, request.blocks) as f64 * f64::from(request.block_id_tokens);
        let own_blocks = (f64::from(task.prompt_tokens) / block).floor();
        let active_blocks = ((row.load.prompt_tokens - row.load.partial_tokens) as f64 / block).floor();
        row.terms[1] = active_blocks + (own_blocks - (shared / block).floor()).max(0.0);
    }
}
