//! What real engines once published, sent again through real sockets: the index must come out as if the bytes had been decoded and
//! applied one after another, whether they arrive live, by replay, or half and half.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test that called")]

use crate::support::{Http, Rank, Running, Says, vllm};
use kvlane_events::resolve::Resolver;
use kvlane_events::wire;
use kvlane_index::{BlockSize, Held, IndexConfig, IndexWriter, KvEvent, Worker};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// One source's published messages, in order.
type Messages = Vec<(u64, Vec<u8>)>;

fn capture(name: &str) -> BTreeMap<String, Messages> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../kvlane-events/tests/captures/vllm-0.32.0/");
    let text = std::fs::read_to_string(format!("{path}{name}.jsonl")).unwrap();
    let mut sources: BTreeMap<String, Messages> = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        if line["kind"] != "frames" || line["channel"] != "pub" {
            continue;
        }
        let frame = |i: usize| unhex(line["frames_hex"][i].as_str().unwrap());
        let seq = u64::from_be_bytes(frame(1).try_into().unwrap());
        sources.entry(line["source"].as_str().unwrap().to_owned()).or_default().push((seq, frame(2)));
    }
    sources
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// Applies messages without any socket.
fn apply(writer: &mut IndexWriter, worker: Worker, messages: &Messages) {
    let mut resolver = Resolver::new(BlockSize::new(32).unwrap());
    let (mut events, mut dropped) = (Vec::new(), Vec::new());
    for (_, payload) in messages {
        let batch = wire::decode(wire::EngineKind::Vllm, payload).unwrap();
        resolver.resolve(&batch, &mut events, &mut dropped);
    }
    for event in &events {
        let _ = writer.apply(worker, event);
    }
}

fn reference(sources: &BTreeMap<String, Messages>) -> (Vec<Held>, Vec<Vec<String>>) {
    let (mut writer, index) = kvlane_index::partition(IndexConfig::new(BlockSize::new(32).unwrap()));
    for (messages, rank) in sources.values().zip(0..) {
        apply(&mut writer, Worker::new(0, rank), messages);
    }
    let ranks = 0..u32::try_from(sources.len()).unwrap();
    (index.workers(), ranks.map(|rank| sorted(index.dump(Worker::new(0, rank)))).collect())
}

/// One line for each block: where, after which, as what. Chains may be cut and listed in any way.
fn sorted(events: Vec<KvEvent>) -> Vec<String> {
    let mut lines = Vec::new();
    for event in events {
        match event {
            KvEvent::Stored { tier, group, mut parent, blocks } => {
                for block in blocks {
                    lines.push(format!("{tier:?} {group:?} {parent:?} {block:?}"));
                    parent = Some(block.engine);
                }
            }
            KvEvent::StoredByHash { tier, group, hashes } => {
                lines.extend(hashes.iter().map(|hash| format!("{tier:?} {group:?} {hash:?}")));
            }
            other => lines.push(format!("{other:?}")),
        }
    }
    lines.sort();
    lines
}

async fn check(name: &str, live_from: impl Fn(usize) -> usize) {
    let sources = capture(name);
    let mut ranks = Vec::new();
    for messages in sources.values() {
        let mut rank = Rank::start("kv", 0, 0).await;
        for (seq, payload) in &messages[..live_from(messages.len())] {
            rank.record(*seq, payload.clone());
        }
        ranks.push(rank);
    }
    let said: serde_json::Map<String, Value> =
        ranks.iter().enumerate().map(|(rank, r)| (rank.to_string(), r.source())).collect();
    let http = Http::start(Says { sources: Some(json!(said)), ..vllm("m", 32, 1e9) }, 0).await;
    let running = Running::start(&[http.url()]);
    running
        .until("every rank is asked", |v| {
            let ranks = &v.instances[0].ranks;
            ranks.len() == sources.len()
                && ranks.iter().all(|r| matches!(r.trust.name(), "live" | "rebuilding"))
        })
        .await;
    for (rank, messages) in ranks.iter_mut().zip(sources.values()) {
        for (seq, payload) in &messages[live_from(messages.len())..] {
            rank.record(*seq, payload.clone());
            rank.send(vec![b"kv".to_vec(), seq.to_be_bytes().to_vec(), payload.clone()]).await;
        }
    }
    let (held, dumps) = reference(&sources);
    let batches: u64 = sources.values().map(|m| m.len() as u64).sum();
    running
        .until_stats("all batches are applied", |s| s.iter().map(|(_, s)| s.batches).sum::<u64>() == batches)
        .await;
    running.fleet.flush().await;
    let view = running.fleet.snapshot();
    let index = &view.instances[0].partition.as_ref().unwrap().index;
    assert_eq!(index.workers(), held, "{name}");
    for (dump, rank) in dumps.into_iter().zip(0..) {
        assert_eq!(sorted(index.dump(Worker::new(0, rank))), dump, "{name}, rank {rank}");
    }
    assert!(!held.is_empty() || name.starts_with("08"), "{name} leaves nothing to compare");
    running.stop().await;
}

const CAPTURES: [&str; 6] = [
    "01-stored-root-and-chained",
    "03-lora",
    "10-evict-bytes-hash-sha256-cbor",
    "11-evict-duplicates-bytes-hash",
    "20-hybrid-groups",
    "30-data-parallel-2",
];

#[tokio::test]
async fn recorded_engines_give_the_same_index_live() {
    for name in CAPTURES {
        check(name, |_| 0).await;
    }
}

#[tokio::test]
async fn recorded_engines_give_the_same_index_by_replay() {
    for name in CAPTURES {
        check(name, |all| all).await;
    }
}

#[tokio::test]
async fn recorded_engines_give_the_same_index_half_and_half() {
    for name in CAPTURES {
        check(name, |all| all / 2).await;
    }
}
