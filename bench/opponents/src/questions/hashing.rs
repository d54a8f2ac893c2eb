//! What does it cost to get from token ids to an answer?
//!
//! *hash*: block hashes of a prompt; ours makes prefix hashes in the same call. *ask*: those and the query, at a full hit: what a
//! gateway pays for each request.

use std::hint::black_box;

use dynamo_kv_router::protocols::{BlockHashOptions, compute_block_hash_for_seq};
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_index::{BlockSize, EngineHash, StoredBlock, Worker};

use crate::clock::thread_cpu_ns;
use crate::contender::{Contender, Setup};
use crate::contenders::{dynamo, kvlane, smg};
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::workload::{engine_hashes, random, stored};

const WORKERS: u64 = 64;
const BLOCK_TOKENS: u32 = 16;

/// One way from tokens to hashes, or through them to an answer.
type Way<'i> = Box<dyn Fn(&[u32]) -> usize + 'i>;

fn dynamo_hashes(tokens: &[u32]) -> usize {
    black_box(compute_block_hash_for_seq(tokens, BLOCK_TOKENS, BlockHashOptions::default())).len()
}

fn smg_hashes(tokens: &[u32]) -> usize {
    black_box(kv_index::compute_request_content_hashes(tokens, BLOCK_TOKENS as usize)).len()
}

fn block_size() -> BlockSize {
    BlockSize::new(BLOCK_TOKENS).expect("not 0")
}

/// Runs prompts of several lengths.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "hashing", plan.rounds, plan.quick)?;
    for tokens in [1_024usize, 8_192, 131_072] {
        let mut state = 1;
        let prompts: Vec<Vec<u32>> = (0..(1 << 20) / tokens)
            .map(|_| (0..tokens).map(|_| (random(&mut state) % 150_000) as u32).collect())
            .collect();
        let setup = Setup { workers: WORKERS as usize, event_threads: 1 };
        let dynamo = dynamo::Pooled::new(setup);
        let chain = smg::Chain::new(setup);
        let ours = kvlane::Kvlane::new(setup);
        for (number, prompt) in prompts.iter().enumerate() {
            let mut blocks = Vec::new();
            prompt_hashes(prompt, block_size(), &Namespace::default(), &mut blocks);
            let names: Vec<EngineHash> = engine_hashes(&blocks);
            let chain_of = blocks.iter().zip(names).map(|(&block, engine)| StoredBlock { engine, block });
            let events = [stored(Worker::new(number as u64 % WORKERS, 0), None, chain_of.collect())];
            dynamo.apply(dynamo.batch(&events));
            chain.apply(chain.batch(&events));
            ours.apply(ours.batch(&events));
        }
        dynamo.settle();
        let contenders: [(&str, Way<'_>, Way<'_>); 4] = [
            (
                "dynamo",
                Box::new(dynamo_hashes),
                Box::new(|t| {
                    let hashes = compute_block_hash_for_seq(t, BLOCK_TOKENS, BlockHashOptions::default());
                    dynamo.ask_owned(hashes).workers
                }),
            ),
            (
                "chain",
                Box::new(smg_hashes),
                Box::new(|t| {
                    let hashes = kv_index::compute_request_content_hashes(t, BLOCK_TOKENS as usize);
                    chain.ask(0, &hashes).workers
                }),
            ),
            (
                "chain-into",
                Box::new(smg_hashes),
                Box::new(|t| {
                    let hashes = kv_index::compute_request_content_hashes(t, BLOCK_TOKENS as usize);
                    chain.ask(1, &hashes).workers
                }),
            ),
            ("kvlane", Box::new(|t| ours.hash(t)), Box::new(|t| ours.ask_tokens(t).workers)),
        ];
        let mut rounds = vec![Vec::new(); contenders.len()];
        let repeats = plan.size(4, 1);
        interleave(plan.rounds, contenders.len(), |_, turn| {
            let (_, hash, ask) = &contenders[turn];
            let time = |what: &dyn Fn(&[u32]) -> usize| {
                let cpu = thread_cpu_ns();
                for _ in 0..repeats {
                    for prompt in &prompts {
                        black_box(what(black_box(prompt)));
                    }
                }
                (thread_cpu_ns() - cpu) as f64 / (repeats * prompts.len()) as f64
            };
            rounds[turn].push((time(hash), time(ask)));
        });
        for (turn, (name, _, ask)) in contenders.iter().enumerate() {
            let found = prompts.iter().filter(|prompt| ask(prompt) == 1).count();
            assert_eq!(found, prompts.len(), "{name}: each prompt is at one worker");
            let figure = |f: fn(&(f64, f64)) -> f64| Spread::of(rounds[turn].iter().map(f).collect());
            sheet.row(
                &[("tokens", &tokens)],
                name,
                &[("hash_cpu_us", figure(|r| r.0 / 1e3)), ("ask_cpu_us", figure(|r| r.1 / 1e3))],
                None,
            );
        }
    }
    sheet.end()
}
