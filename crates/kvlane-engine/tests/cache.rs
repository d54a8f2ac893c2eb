//! What the events say is what the cache holds, whatever the requests: compared with the index's oracle.

use kvlane_engine::{BlockPool, Engine, EngineConfig, Request, RequestId, StepOutput};
use kvlane_index::reference::Oracle;
use kvlane_index::{BlockHash, BlockSize, EngineHash, IndexConfig, KvEvent, MAX_COPIES, Tier, Worker};
use proptest::prelude::*;
use std::collections::HashMap;

const BLOCK: u32 = 4;

/// How often each tier holds each block.
type Copies = HashMap<(Tier, EngineHash), u32>;

/// A request of a small world in which prompts share prefixes.
#[derive(Clone, Debug)]
struct Ask {
    /// Which of a few conversations.
    family: u64,
    /// Prompt tokens.
    prompt: u32,
    output: u32,
    /// Microseconds after the last one.
    after_us: u64,
    /// Whether it is cancelled on the next arrival.
    cancelled: bool,
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let ask = (0u64..5, 1u32..60, 1u32..24, 0u64..40_000, prop::bool::weighted(0.15)).prop_map(
        |(family, prompt, output, after_us, cancelled)| Ask { family, prompt, output, after_us, cancelled },
    );
    prop::collection::vec(ask, 1..60)
}

fn chain(family: u64, blocks: u32) -> Vec<BlockHash> {
    // Conversations 0 and 1 share their first three blocks.
    (0..blocks).map(|i| BlockHash(if i < 3 { family / 2 } else { family } * 1_000 + u64::from(i))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn events_tell_the_truth(asks in asks(), blocks in 24u32..60, step_tokens in 5u32..80, reset in any::<bool>(), host_blocks in prop::sample::select(vec![0u32, 20, 90])) {
        let block_size = BlockSize::new(BLOCK).unwrap();
        let mut engine = Engine::new(EngineConfig {
            block_size, blocks, step_tokens, host_blocks, max_running: 4, ..EngineConfig::h200_llama_8b()
        });
        let worker = Worker::new(1, 0);
        let mut index = Oracle::new(&IndexConfig::new(block_size));
        let mut copies: Copies = HashMap::new();
        let mut most_copies = 0;
        let (mut out, mut now, mut open) = (StepOutput::default(), 0, HashMap::new());
        let mut cancel = None;
        for (i, ask) in asks.iter().chain(&asks).enumerate() {
            now += ask.after_us;
            while let Some(at) = engine.next_step_at().filter(|at| *at <= now) {
                engine.step(at, &mut out);
                let load = engine.load();
                prop_assert!(load.held_blocks <= load.usable_blocks && load.running <= 4);
                apply(&mut index, worker, &out, &mut copies, &mut most_copies);
                answered(&out, &mut open)?;
            }
            if let Some(id) = cancel.take() {
                prop_assert_eq!(engine.cancel(id), open.remove(&id).is_some());
            }
            let id = RequestId(i as u64);
            let blocks = chain(ask.family, (ask.prompt + ask.output) / BLOCK);
            let request = Request { id, prompt_tokens: ask.prompt, output_tokens: ask.output, blocks, content: None };
            engine.submit(now, request).unwrap();
            open.insert(id, (ask.output, 0));
            cancel = ask.cancelled.then_some(id);

            if i % 13 == 12 {
                while let Some(at) = engine.next_step_at() {
                    engine.step(at, &mut out);
                    now = now.max(at);
                    apply(&mut index, worker, &out, &mut copies, &mut most_copies);
                    answered(&out, &mut open)?;
                }
                prop_assert_eq!(engine.load().held_blocks, 0);
                compare(&engine, &index, worker, &copies, most_copies)?;
                if reset && i % 2 == 0 {
                    prop_assert!(engine.reset_prefix_cache());
                }
            }
        }
        while let Some(at) = engine.next_step_at() {
            engine.step(at, &mut out);
            apply(&mut index, worker, &out, &mut copies, &mut most_copies);
            answered(&out, &mut open)?;
        }
        prop_assert!(open.is_empty(), "every request that is not cancelled ends: {:?}", open);
        compare(&engine, &index, worker, &copies, most_copies)?;
        let totals = engine.totals();
        prop_assert_eq!(totals.finished + totals.cancelled, 2 * asks.len() as u64);
    }
}

/// Tokens come one by one, the last one marked; the cache is asked for whole blocks and never for the last token.
fn answered(out: &StepOutput, open: &mut HashMap<RequestId, (u32, u32)>) -> Result<(), TestCaseError> {
    for token in &out.tokens {
        let (output, seen) = open.get_mut(&token.request).expect("tokens of an open request");
        prop_assert_eq!(token.index, *seen);
        prop_assert_eq!(token.cached_tokens % BLOCK, 0);
        *seen += 1;
        prop_assert_eq!(token.last, seen == output);
        if token.last {
            open.remove(&token.request);
        }
    }
    Ok(())
}

fn apply(index: &mut Oracle, worker: Worker, out: &StepOutput, copies: &mut Copies, most_copies: &mut u32) {
    for event in &out.events {
        let _counts = index.apply(worker, &event.event);
        match &event.event {
            KvEvent::Stored { tier, blocks, .. } => {
                for block in blocks {
                    let count = copies.entry((*tier, block.engine)).or_default();
                    *count += 1;
                    *most_copies = (*most_copies).max(*count);
                }
            }
            KvEvent::Removed { tier, hashes, .. } => {
                for hash in hashes {
                    *copies.get_mut(&(*tier, *hash)).expect("removed after it was stored") -= 1;
                }
            }
            KvEvent::Cleared { .. } => copies.clear(),
            KvEvent::StoredByHash { .. } => {}
        }
    }
}

fn compare(
    engine: &Engine,
    index: &Oracle,
    worker: Worker,
    copies: &Copies,
    most_copies: u32,
) -> Result<(), TestCaseError> {
    let device = engine.pool().contents().map(|(hash, count)| ((Tier::Device, hash), count));
    let host = engine.host_pool().into_iter().flat_map(BlockPool::contents);
    let mut held: Vec<_> = device.chain(host.map(|(hash, count)| ((Tier::Host, hash), count))).collect();
    let mut said: Vec<_> =
        copies.iter().filter(|c| *c.1 > 0).map(|(block, count)| (*block, *count)).collect();
    held.sort_unstable();
    said.sort_unstable();
    prop_assert_eq!(&held, &said, "stored minus removed is what is held, copy by copy");
    for family in 0..5 {
        let prompt = chain(family, 30);
        let hashes = engine.engine_hashes(&prompt);
        let device = engine.pool().cached_run(&hashes);
        let host = engine.host_pool().map_or(0, |host| host.cached_run(&hashes[device..]));
        let truth = (device as u32, host as u32);
        let told =
            index.overlap(&prompt).get(worker).map_or((0, 0), |overlap| (overlap.device, overlap.host));
        if most_copies <= u32::from(MAX_COPIES) {
            prop_assert_eq!(told, truth, "family {}: (device, host)", family);
        } else {
            prop_assert!(told.0 <= truth.0, "family {}: {:?} told, {:?} held", family, told, truth);
        }
    }
    Ok(())
}

#[test]
fn one_run_is_like_another() {
    let run = || {
        let config = EngineConfig { blocks: 40, host_blocks: 30, ..EngineConfig::h200_llama_8b() };
        let mut engine = Engine::new(config);
        let (mut out, mut all) = (StepOutput::default(), Vec::new());
        for i in 0..50u64 {
            let blocks = chain(i % 5, 20);
            let request = Request {
                id: RequestId(i),
                prompt_tokens: 100 + i as u32,
                output_tokens: 9,
                blocks,
                content: None,
            };
            engine.submit(i * 3_000, request).unwrap();
        }
        while let Some(at) = engine.next_step_at() {
            engine.step(at, &mut out);
            all.push(out.clone());
        }
        all
    };
    assert_eq!(run(), run());
}
