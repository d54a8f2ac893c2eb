//! One payload through a decoder and the resolver.

#![no_main]

use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{EngineKind, WireEvent, decode};
use kvlane_index::{BlockSize, KvEvent};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&head, payload)) = input.split_first() else { return };
    let engine = [EngineKind::Vllm, EngineKind::Sglang, EngineKind::TrtLlm][usize::from(head % 3)];
    let size = [1, 2, 4, 16, 32][usize::from(head / 3) % 5];
    let Ok(batch) = decode(engine, payload) else { return };
    assert!(batch.events.len() + batch.dropped.len() <= payload.len());
    for event in &batch.events {
        if let WireEvent::Stored(stored) = event {
            assert!(stored.tokens.len() + stored.hashes.len() <= payload.len());
        }
    }
    let mut resolver = Resolver::new(BlockSize::new(size).expect("not 0"));
    let (mut events, mut dropped) = (Vec::new(), Vec::new());
    // Twice: the second time ratios of block sizes are known.
    for _ in 0..2 {
        resolver.resolve(&batch, &mut events, &mut dropped);
    }
    for event in &events {
        match event {
            KvEvent::Stored { blocks, .. } => assert!(!blocks.is_empty() && blocks.len() <= payload.len()),
            KvEvent::StoredByHash { hashes, .. } => assert!(hashes.len() <= payload.len()),
            KvEvent::Removed { hashes, .. } => assert!(hashes.len() <= 1 << 20),
            KvEvent::Cleared { tier } => assert!(tier.is_none()),
        }
    }
});
