//! The engine announces what a real vLLM 0.32 announced for the same requests, event for event.
//!
//! Scenarios 10 and 11 were recorded from one engine with 24 blocks: eviction, reset, copies of one hash. Hashes differ
//! (the model's are not SHA-256), so each recorded hash must stand for exactly one of ours.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, outside of test functions")]

use kvlane_engine::{Engine, EngineConfig, Request, RequestId, StepOutput};
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_index::{BlockSize, EngineHash, KvEvent};
use serde_json::Value;
use std::collections::HashMap;

const CAPTURES: [&str; 2] = [
    include_str!("captures/10-evict-bytes-hash-sha256-cbor.jsonl"),
    include_str!("captures/11-evict-duplicates-bytes-hash.jsonl"),
];

/// An event with its hashes: tag, parent, hashes.
type Said<H> = (&'static str, Option<H>, Vec<H>);

#[test]
fn eviction_copies_and_resets_are_announced_as_vllm_announced_them() {
    let block_size = BlockSize::new(32).unwrap();
    let mut engine = Engine::new(EngineConfig {
        block_size,
        blocks: 24,
        step_tokens: 2_048,
        ..EngineConfig::h200_llama_8b()
    });
    let mut names: HashMap<String, EngineHash> = HashMap::new();
    let (mut requests, mut cached_compared) = (0, 0);
    let lines = CAPTURES.iter().flat_map(|capture| capture.lines());
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| line["kind"] == "request") {
        if line["path"] == "/reset_prefix_cache" {
            assert!(engine.reset_prefix_cache(), "no request runs");
            continue;
        }
        let answer = lines[i..].iter().find(|line| line["kind"] == "response").unwrap();
        let recorded: Vec<Said<String>> = lines[i..]
            .iter()
            .take_while(|line| line["kind"] != "response")
            .filter(|line| line["kind"] == "frames")
            .flat_map(|line| line["decoded"][1].as_array().unwrap().iter().map(said_by_vllm))
            .collect();

        let (cached, events) = run(&mut engine, requests, &line["body"], block_size);
        requests += 1;
        assert_eq!(events.len(), recorded.len(), "events of request {requests}: {}", line["note"]);
        for (ours, theirs) in events.iter().zip(&recorded) {
            assert_eq!((ours.0, ours.2.len()), (theirs.0, theirs.2.len()), "request {requests}");
            let pairs = ours.1.iter().chain(&ours.2).zip(theirs.1.iter().chain(&theirs.2));
            for (ours, theirs) in pairs {
                let known = *names.entry(theirs.clone()).or_insert(*ours);
                assert_eq!(known, *ours, "request {requests}: a recorded hash stands for one of ours");
            }
        }
        if let Some(recorded) = answer["body"]["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() {
            assert_eq!(u64::from(cached), recorded, "cached tokens of request {requests}");
            cached_compared += 1;
        }
    }
    let distinct: std::collections::HashSet<_> = names.values().collect();
    assert_eq!(distinct.len(), names.len(), "two recorded hashes never stand for one of ours");
    assert_eq!((requests, cached_compared), (15, 15));
}

/// Runs one request to its end: its cached tokens and what was announced, one removal each.
fn run(engine: &mut Engine, id: u64, body: &Value, block_size: BlockSize) -> (u32, Vec<Said<EngineHash>>) {
    let mut tokens: Vec<u32> =
        body["prompt"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect();
    let prompt_tokens = tokens.len() as u32;
    let output_tokens = body["max_tokens"].as_u64().unwrap() as u32;
    tokens.extend(std::iter::repeat_n(0, output_tokens as usize));
    let mut blocks = Vec::new();
    prompt_hashes(&tokens, block_size, &Namespace::default(), &mut blocks);
    let request = Request { id: RequestId(id), prompt_tokens, output_tokens, blocks, content: None };
    engine.submit(0, request).unwrap();
    let (mut out, mut cached, mut said) = (StepOutput::default(), 0, Vec::new());
    while let Some(at) = engine.next_step_at() {
        engine.step(at, &mut out);
        cached = out.tokens.first().map_or(cached, |token| token.cached_tokens);
        for event in &out.events {
            match &event.event {
                KvEvent::Cleared { .. } => said.push(("AllBlocksCleared", None, vec![])),
                KvEvent::Removed { hashes, .. } => {
                    said.extend(hashes.iter().map(|hash| ("BlockRemoved", None, vec![*hash])));
                }
                KvEvent::Stored { parent, blocks, .. } => {
                    let hashes = blocks.iter().map(|block| block.engine).collect();
                    said.push(("BlockStored", *parent, hashes));
                }
                KvEvent::StoredByHash { .. } => panic!("the engine knows the content of what it stores"),
            }
        }
    }
    (cached, said)
}

fn said_by_vllm(event: &Value) -> Said<String> {
    let tag = match event["type"].as_str().unwrap() {
        "BlockStored" => "BlockStored",
        "BlockRemoved" => "BlockRemoved",
        _ => "AllBlocksCleared",
    };
    let hashes = event["block_hashes"].as_array();
    let parent = event.get("parent_block_hash").filter(|parent| !parent.is_null());
    (tag, parent.map(Value::to_string), hashes.into_iter().flatten().map(Value::to_string).collect())
}
