//! What the engine model writes is what the router's decoders read: two crates that share no code, event for event.

use kvlane_engine::wire::{Form, write_batch};
use kvlane_engine::{CacheEvent, Content, Engine, EngineConfig, Request, RequestId, StepOutput};
use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{EngineKind, decode};
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_index::{BlockSize, EngineHash, KvEvent, StoredBlock, Tier};
use std::sync::Arc;

const BLOCK: u32 = 4;
const SEEDS: u64 = 30;

/// One block's change, however events group them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    Stored(Tier, Option<EngineHash>, StoredBlock),
    Removed(Tier, EngineHash),
    Cleared,
}

fn changes<'a>(events: impl IntoIterator<Item = &'a KvEvent>) -> Vec<Change> {
    let mut changes = Vec::new();
    for event in events {
        match event {
            KvEvent::Stored { tier, group: _, parent, blocks } => {
                let parents = std::iter::once(*parent).chain(blocks.iter().map(|block| Some(block.engine)));
                changes
                    .extend(parents.zip(blocks).map(|(parent, block)| Change::Stored(*tier, parent, *block)));
            }
            KvEvent::Removed { tier, group: _, hashes } => {
                changes.extend(hashes.iter().map(|hash| Change::Removed(*tier, *hash)));
            }
            KvEvent::Cleared { tier: _ } => changes.push(Change::Cleared),
            KvEvent::StoredByHash { .. } => unreachable!("every block of this engine has content"),
        }
    }
    changes
}

/// Through the wire and back.
fn read_back(form: Form, kind: EngineKind, events: &[CacheEvent], resolver: &mut Resolver) -> Vec<Change> {
    let mut payload = Vec::new();
    write_batch(form, 1.5, events, Some(0), BlockSize::new(BLOCK).expect("not 0"), &mut payload);
    let batch = decode(kind, &payload).expect("a batch");
    assert_eq!((batch.ts_s, batch.dp_rank), (1.5, Some(0)), "{form:?}");
    let (mut out, mut dropped) = (Vec::new(), Vec::new());
    resolver.resolve(&batch, &mut out, &mut dropped);
    assert!(batch.dropped.is_empty() && dropped.is_empty(), "{form:?}: {:?} {dropped:?}", batch.dropped);
    changes(&out)
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % u64::from(end)) as u32
    }
}

fn request(id: u64, dice: &mut Dice, block_size: BlockSize) -> Request {
    let (family, length, output_tokens) = (dice.below(4), 1 + dice.below(60), 1 + dice.below(12));
    let tokens: Vec<u32> = (0..length + output_tokens).map(|i| family * 70_000 + i).collect();
    let adapter = (dice.below(3) == 0).then(|| (1, "ad".to_owned()));
    let salt = (dice.below(3) == 0).then(|| format!("tenant-{}", dice.below(2)));
    let namespace = Namespace {
        adapter: adapter.as_ref().map(|a| a.1.as_str()),
        salt: salt.as_deref(),
        ..Namespace::default()
    };
    let mut blocks = Vec::new();
    prompt_hashes(&tokens, block_size, &namespace, &mut blocks);
    let content = Some(Arc::new(Content { tokens, adapter, salt }));
    Request { id: RequestId(id), prompt_tokens: length, output_tokens, blocks, content }
}

#[test]
fn every_form_comes_back_as_it_was_meant() {
    let block_size = BlockSize::new(BLOCK).expect("not 0");
    let forms = [
        (Form::VllmMap, EngineKind::Vllm),
        (Form::VLLM_0_23, EngineKind::Vllm),
        (Form::SglangMap, EngineKind::Sglang),
    ];
    let mut compared = 0;
    for seed in 0..SEEDS {
        let mut dice = Dice(seed);
        let mut engine = Engine::new(EngineConfig {
            block_size,
            blocks: 40,
            host_blocks: 60,
            step_tokens: 30,
            max_running: 4,
            ..EngineConfig::h200_llama_8b()
        });
        let mut resolvers = forms.map(|_| Resolver::new(block_size));
        let (mut out, mut now) = (StepOutput::default(), 0);
        for id in 0..60 {
            now += u64::from(dice.below(20_000));
            engine.submit(now, request(id, &mut dice, block_size)).expect("it fits");
            if dice.below(10) == 0 {
                engine.reset_prefix_cache();
            }
            // To the end for the last one.
            while let Some(at) = engine.next_step_at().filter(|at| *at <= now || id == 59) {
                engine.step(at, &mut out);
                let meant = changes(out.events.iter().map(|event| &event.event));
                compared += meant.len();
                for ((form, kind), resolver) in forms.iter().zip(&mut resolvers) {
                    let read = read_back(*form, *kind, &out.events, resolver);
                    assert_eq!(read, meant, "seed {seed}, {form:?}");
                }
            }
        }
    }
    assert!(compared > 10_000, "{compared} changes compared");
}
