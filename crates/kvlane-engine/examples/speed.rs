//! How fast the engine model runs: one engine, a day of a production-like load, one core.
//!
//! `cargo run --release -p kvlane-engine --example speed`
//!
//! Prompts of 12,000 tokens on average that share half of it with an earlier one, answers of 350: the averages of public
//! conversation traces. Once in blocks of 16 tokens as engines have them, once of 512 as such traces have them.

#![expect(clippy::print_stdout, reason = "an example prints")]
#![expect(clippy::disallowed_methods, reason = "an example may look at the clock")]

use kvlane_engine::{Engine, EngineConfig, Request, RequestId, StepOutput};
use kvlane_index::{BlockHash, BlockSize};
use std::time::Instant;

const REQUESTS: u64 = 20_000;
const PROMPT_TOKENS: u32 = 12_000;
const OUTPUT_TOKENS: u32 = 350;
/// Microseconds between two requests: near the engine's capacity.
const EVERY_US: u64 = 300_000;

fn main() {
    for block_tokens in [16, 512] {
        let block_size = BlockSize::new(block_tokens).expect("not 0");
        let config = EngineConfig::h200_llama_8b();
        let blocks = 56_057 * 16 / block_tokens + 1;
        let mut engine = Engine::new(EngineConfig { block_size, blocks, ..config });
        let mut out = StepOutput::default();
        let (mut seed, mut tokens, mut events) = (1u64, 0, 0);
        let started = Instant::now();
        for i in 0..REQUESTS {
            let now = i * EVERY_US;
            while let Some(at) = engine.next_step_at().filter(|at| *at <= now) {
                engine.step(at, &mut out);
                tokens += out.tokens.len();
                events += out.events.len();
            }
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let prompt_tokens = PROMPT_TOKENS / 2 + (seed >> 33) as u32 % PROMPT_TOKENS;
            let (family, shared) = (i % 31, prompt_tokens / block_tokens / 2);
            let blocks = (0..prompt_tokens / block_tokens).map(|b| {
                BlockHash(if b < shared { (family + 1) << 32 } else { (i + 1_000) << 32 } | u64::from(b))
            });
            let request = Request {
                id: RequestId(i),
                prompt_tokens,
                output_tokens: OUTPUT_TOKENS,
                blocks: blocks.collect(),
                content: None,
            };
            engine.submit(now, request).expect("it fits");
        }
        while let Some(at) = engine.next_step_at() {
            engine.step(at, &mut out);
            tokens += out.tokens.len();
            events += out.events.len();
        }
        let took = started.elapsed().as_secs_f64();
        let totals = engine.totals();
        println!(
            "blocks of {block_tokens:>3}: {:>9.0} requests/min  ({} steps, {tokens} tokens, {events} events, hits {:.0} %, \
             {:.0} in a batch, {took:.2} s)",
            REQUESTS as f64 / took * 60.0,
            totals.steps,
            totals.hit_tokens as f64 / totals.queried_tokens as f64 * 100.0,
            tokens as f64 / totals.steps as f64,
        );
    }
}
