//! Which adapters (LoRA) are in the memory of which worker, as far as a router can tell.
//!
//! `/v1/models` lists the adapters that an engine can serve; how many of them it holds beside the model at a time is a setting that it does not tell (vLLM: `--max-loras`, 1
//! by default), and loading one delays whoever asks for it. So an adapter counts as resident where a running request uses it, and where it was the last that
//! was asked for: true for every setting. Others may be there, and are priced as if they were not.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The adapters in use at one engine; outlives the table.
#[derive(Debug, Default)]
pub(crate) struct Adapters(Mutex<Vec<OfRank>>);

/// Bounded by the engine's ranks times what runs there.
#[derive(Debug)]
struct OfRank {
    rank: u32,
    /// The last that was asked for.
    last: u64,
    /// Each with the running requests that use it.
    running: Vec<(u64, u32)>,
}

impl Adapters {
    /// Whether the adapter of this number needs no loading at `rank`.
    pub(super) fn is_resident(&self, rank: u32, adapter: u64) -> bool {
        let ranks = self.lock();
        let of = ranks.iter().find(|of| of.rank == rank);
        of.is_some_and(|of| of.last == adapter || of.running.iter().any(|(running, _)| *running == adapter))
    }

    /// A request that uses it was sent to `rank`.
    pub(super) fn began(&self, rank: u32, adapter: u64) {
        let mut ranks = self.lock();
        let at = ranks.iter().position(|of| of.rank == rank).unwrap_or_else(|| {
            ranks.push(OfRank { rank, last: adapter, running: Vec::new() });
            ranks.len() - 1
        });
        let of = &mut ranks[at];
        of.last = adapter;
        match of.running.iter_mut().find(|(running, _)| *running == adapter) {
            Some((_, requests)) => *requests += 1,
            None => of.running.push((adapter, 1)),
        }
    }

    /// Such a request left `rank`.
    pub(super) fn ended(&self, rank: u32, adapter: u64) {
        let mut ranks = self.lock();
        let Some(of) = ranks.iter_mut().find(|of| of.rank == rank) else { return };
        of.running.retain_mut(|(running, requests)| {
            if *running == adapter {
                *requests -= 1;
            }
            *requests > 0
        });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OfRank>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_adapters_and_the_last_one_are_there() {
        let adapters = Adapters::default();
        assert!(!adapters.is_resident(0, 7));
        adapters.began(0, 7);
        adapters.began(0, 7);
        adapters.began(0, 8);
        let there = |adapter| adapters.is_resident(0, adapter);
        assert!(there(7) && there(8) && !adapters.is_resident(1, 7), "ranks have memories of their own");
        adapters.ended(0, 7);
        adapters.ended(0, 8);
        assert!(there(7), "one request still runs");
        adapters.ended(0, 7);
        assert!(!there(7) && there(8), "the last one stays until another comes");
    }
}
