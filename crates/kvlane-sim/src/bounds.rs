//! What hit rate a trace allows: a router's figure means little without these.
//!
//! Requests are taken in the order of the trace, one after another, without queueing. Hits are leading runs of whole blocks, and the block of the last
//! token is always computed, as engines do.

use crate::outcome::Quantiles;
use crate::trace::{Trace, TraceRequest};
use kvlane_engine::EngineConfig;

/// Shares of prompt tokens that come from a cache, 0 to 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bounds {
    /// A cache that forgets nothing.
    pub infinite: f64,
    /// One LRU cache as large as all workers' together.
    pub pooled_lru: f64,
    /// One cache of that size that knows the future (Belady: it drops what is needed latest).
    pub pooled_belady: f64,
    /// Time to first token of every request alone on an idle fleet with a cache that forgets nothing: no router and no load gives less.
    pub least_ttft_ms: Quantiles,
}

/// The bounds of `trace` for a fleet of `engine`s that holds `pool_tokens` in all.
pub fn bounds(trace: &Trace, engine: &EngineConfig, pool_tokens: u64) -> Bounds {
    let capacity = (pool_tokens / u64::from(trace.block_tokens)) as usize;
    Bounds {
        infinite: hit_rate(trace, &mut Infinite { seen: vec![false; trace.distinct_blocks() as usize] }),
        pooled_lru: hit_rate(trace, &mut Lru::new(trace.distinct_blocks(), capacity)),
        pooled_belady: hit_rate(trace, &mut Belady::new(trace, capacity)),
        least_ttft_ms: least_ttft_ms(trace, engine),
    }
}

fn least_ttft_ms(trace: &Trace, engine: &EngineConfig) -> Quantiles {
    let timing = &engine.timing;
    let mut cache = Infinite { seen: vec![false; trace.distinct_blocks() as usize] };
    let mut all = Vec::with_capacity(trace.requests.len());
    for request in &trace.requests {
        let hits = usable(trace, request).iter().take_while(|b| cache.holds(**b)).count() as u32;
        cache.used(trace.blocks(request), 0);
        let prefill_us =
            timing.prefill_alone_us(request.input_tokens, hits * trace.block_tokens, engine.step_tokens);
        all.push((timing.front_end_us(request.input_tokens) + prefill_us) as f64 / 1000.0);
    }
    Quantiles::of(&mut all)
}

/// Blocks of a prompt that can be hit: not the one of the last token.
fn usable<'t>(trace: &'t Trace, request: &TraceRequest) -> &'t [u32] {
    let most = ((request.input_tokens - 1) / trace.block_tokens) as usize;
    let blocks = trace.blocks(request);
    &blocks[..blocks.len().min(most)]
}

trait Cache {
    fn holds(&self, block: u32) -> bool;
    /// The blocks of one prompt were used, in this order; `first_use` counts block uses before it.
    fn used(&mut self, blocks: &[u32], first_use: usize);
}

fn hit_rate(trace: &Trace, cache: &mut dyn Cache) -> f64 {
    let mut hit_tokens = 0u64;
    let mut uses = 0;
    for request in &trace.requests {
        let hits = usable(trace, request).iter().take_while(|b| cache.holds(**b)).count();
        hit_tokens += hits as u64 * u64::from(trace.block_tokens);
        let blocks = trace.blocks(request);
        cache.used(blocks, uses);
        uses += blocks.len();
    }
    hit_tokens as f64 / trace.input_tokens().max(1) as f64
}

struct Infinite {
    seen: Vec<bool>,
}

impl Cache for Infinite {
    fn holds(&self, block: u32) -> bool {
        self.seen[block as usize]
    }

    fn used(&mut self, blocks: &[u32], _: usize) {
        for b in blocks {
            self.seen[*b as usize] = true;
        }
    }
}

/// A linked list through an array: least recently used first. A prompt's deepest block ages first, so a prefix outlives what follows it.
struct Lru {
    next: Vec<u32>,
    prev: Vec<u32>,
    held: usize,
    capacity: usize,
}

const OUT: u32 = u32::MAX;

impl Lru {
    fn new(distinct: u32, capacity: usize) -> Self {
        // The last place is the ring's sentinel.
        let n = distinct as usize + 1;
        let mut lru = Self { next: vec![OUT; n], prev: vec![OUT; n], held: 0, capacity };
        lru.next[n - 1] = distinct;
        lru.prev[n - 1] = distinct;
        lru
    }

    fn unlink(&mut self, b: u32) {
        let (p, n) = (self.prev[b as usize], self.next[b as usize]);
        self.next[p as usize] = n;
        self.prev[n as usize] = p;
        self.next[b as usize] = OUT;
    }
}

impl Cache for Lru {
    fn holds(&self, block: u32) -> bool {
        self.next[block as usize] != OUT
    }

    fn used(&mut self, blocks: &[u32], _: usize) {
        let sentinel = self.next.len() as u32 - 1;
        for b in blocks.iter().rev() {
            if self.holds(*b) {
                self.unlink(*b);
            } else {
                self.held += 1;
            }
            let last = self.prev[sentinel as usize];
            self.next[last as usize] = *b;
            self.prev[*b as usize] = last;
            self.next[*b as usize] = sentinel;
            self.prev[sentinel as usize] = *b;
        }
        while self.held > self.capacity {
            let oldest = self.next[sentinel as usize];
            self.unlink(oldest);
            self.held -= 1;
        }
    }
}

/// Holds the blocks that are needed soonest.
struct Belady {
    /// For each use, the number of the next use of the same block.
    next_use: Vec<u32>,
    /// When each held block is needed; 0 = not held.
    due: Vec<u32>,
    /// Held blocks, latest need first; entries that `due` contradicts are stale.
    heap: std::collections::BinaryHeap<(u32, u32)>,
    held: usize,
    capacity: usize,
}

impl Belady {
    fn new(trace: &Trace, capacity: usize) -> Self {
        let uses: Vec<u32> = trace.requests.iter().flat_map(|r| trace.blocks(r)).copied().collect();
        let distinct = trace.distinct_blocks() as usize;
        let mut next = vec![u32::MAX; distinct];
        let mut next_use = vec![u32::MAX; uses.len()];
        for (i, block) in uses.iter().enumerate().rev() {
            next_use[i] = next[*block as usize];
            next[*block as usize] = u32::try_from(i).unwrap_or(u32::MAX - 1);
        }
        Self {
            next_use,
            due: vec![0; distinct],
            heap: std::collections::BinaryHeap::new(),
            held: 0,
            capacity,
        }
    }
}

impl Cache for Belady {
    fn holds(&self, block: u32) -> bool {
        self.due[block as usize] != 0
    }

    fn used(&mut self, blocks: &[u32], first_use: usize) {
        for (i, b) in blocks.iter().enumerate() {
            let due = self.next_use[first_use + i];
            let held = &mut self.due[*b as usize];
            self.held += usize::from(*held == 0);
            *held = due;
            self.heap.push((due, *b));
        }
        while self.held > self.capacity {
            let Some((due, block)) = self.heap.pop() else { break };
            if self.due[block as usize] == due && due != 0 {
                self.due[block as usize] = 0;
                self.held -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Start;

    fn trace(prompts: &[&[u32]]) -> Trace {
        let mut trace = Trace::new("t", 10);
        for (i, ids) in prompts.iter().enumerate() {
            // One token beyond the whole blocks, so that all of them can hit.
            trace.push(i as u32, Start::AtMs(i as f64), ids.len() as u32 * 10 + 1, 1, ids);
        }
        trace
    }

    #[test]
    fn infinite_counts_every_repeated_prefix() {
        let t = trace(&[&[0, 1], &[0, 2], &[0, 1]]);
        assert_eq!(bounds(&t, &EngineConfig::h200_llama_8b(), 1000).infinite, 30.0 / 63.0);
    }

    #[test]
    fn belady_keeps_what_lru_drops() {
        // Three single blocks in turn through a cache of two.
        let t = trace(&[&[0], &[1], &[2], &[0], &[1], &[2]]);
        let b = bounds(&t, &EngineConfig::h200_llama_8b(), 20);
        assert_eq!(b.pooled_lru, 0.0);
        assert!(b.pooled_belady > 0.0 && b.pooled_belady < b.infinite);
    }

    #[test]
    fn the_block_of_the_last_token_is_computed() {
        let mut t = Trace::new("t", 10);
        for i in 0..2 {
            t.push(i, Start::AtMs(0.0), 20, 1, &[0, 1]);
        }
        assert_eq!(bounds(&t, &EngineConfig::h200_llama_8b(), 1000).infinite, 10.0 / 40.0);
    }
}
