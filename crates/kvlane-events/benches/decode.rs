//! How fast are payloads decoded, tokens materialised as u32 and bounds-checked?
//!
//! Workloads: batches of 64 events of one block, and one event of 2,048 blocks, 16 tokens a block, in vLLM's map form (0.24 and later) and
//! array form. The opponent is `rmp-serde` into owned structs with the same fields. `resolve` adds the hashing of blocks into index
//! events. One thread; the best and the median of 9 rounds of at least 100 ms *of this thread's CPU time* (from
//! `/proc/thread-self/schedstat`), so that a busy machine does not count.
//!
//! `cargo bench -p kvlane-events --bench decode`

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a bench")]
#![allow(missing_docs, dead_code, reason = "the opponent's structs are only filled")]

use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{self, EngineKind};
use kvlane_index::BlockSize;
use serde::Deserialize;
use std::hint::black_box;

const BLOCK: usize = 16;

#[derive(Deserialize)]
struct MapEvent {
    r#type: String,
    #[serde(default)]
    block_hashes: Vec<u64>,
    parent_block_hash: Option<u64>,
    #[serde(default)]
    token_ids: Vec<u32>,
    #[serde(default)]
    block_size: u32,
    lora_id: Option<i64>,
    medium: Option<String>,
    lora_name: Option<String>,
    extra_keys: Option<Vec<Option<Vec<String>>>>,
    group_idx: Option<u32>,
    kv_cache_spec_kind: Option<String>,
}

#[derive(Deserialize)]
struct ArrayEvent(
    String,
    Vec<u64>,
    Option<u64>,
    Vec<u32>,
    u32,
    Option<i64>,
    Option<String>,
    Option<String>,
    Option<Vec<Option<Vec<String>>>>,
    Option<u32>,
    Option<String>,
);

#[derive(Deserialize)]
struct Batch<E>(f64, Vec<E>, Option<u32>);

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(0xa0 | text.len() as u8);
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, len: usize) {
    out.push(0xdd);
    out.extend((len as u32).to_be_bytes());
}

/// A batch as vLLM 0.32 (map) or 0.23 (array) prints it.
fn payload(events: usize, blocks: usize, map: bool) -> Vec<u8> {
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 16
    };
    let mut out = vec![0x93, 0xcb];
    out.extend(1_700_000_000.25f64.to_be_bytes());
    array(&mut out, events);
    for _ in 0..events {
        let key = |out: &mut Vec<u8>, name: &str| {
            if map {
                text(out, name);
            }
        };
        if map {
            out.push(0x8b);
        } else {
            out.push(0x9b);
        }
        key(&mut out, "type");
        text(&mut out, "BlockStored");
        key(&mut out, "block_hashes");
        array(&mut out, blocks);
        for _ in 0..blocks {
            out.push(0xcf);
            out.extend(next().to_be_bytes());
        }
        key(&mut out, "parent_block_hash");
        out.push(0xcf);
        out.extend(next().to_be_bytes());
        key(&mut out, "token_ids");
        array(&mut out, blocks * BLOCK);
        for _ in 0..blocks * BLOCK {
            // A vocabulary of 128k: most ids take three or five bytes.
            let id = (next() % 128_000) as u32;
            match id {
                0..=127 => out.push(id as u8),
                128..=255 => out.extend([0xcc, id as u8]),
                256..=65_535 => {
                    out.push(0xcd);
                    out.extend((id as u16).to_be_bytes());
                }
                _ => {
                    out.push(0xce);
                    out.extend(id.to_be_bytes());
                }
            }
        }
        key(&mut out, "block_size");
        out.push(BLOCK as u8);
        key(&mut out, "lora_id");
        out.push(0xc0);
        key(&mut out, "medium");
        text(&mut out, "GPU");
        key(&mut out, "lora_name");
        out.push(0xc0);
        key(&mut out, "extra_keys");
        array(&mut out, blocks);
        out.extend(std::iter::repeat_n(0xc0, blocks));
        key(&mut out, "group_idx");
        out.push(0);
        key(&mut out, "kv_cache_spec_kind");
        text(&mut out, "full_attention");
    }
    out.push(0);
    out
}

/// Seconds that this thread has run.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// Rounds' seconds for one pass, sorted.
fn measure(mut once: impl FnMut()) -> [f64; 9] {
    let mut rounds = [0.0; 9];
    for seconds in &mut rounds {
        let start = cpu_s();
        let mut passes = 0u32;
        while cpu_s() - start < 0.1 {
            for _ in 0..256 {
                once();
            }
            passes += 256;
        }
        *seconds = (cpu_s() - start) / f64::from(passes);
    }
    rounds.sort_by(f64::total_cmp);
    rounds
}

fn main() {
    println!("{:34} {:>12} {:>12} {:>12}", "", "events/s", "blocks/s", "best blocks/s");
    for (name, events, blocks) in [("64 events of 1 block", 64, 1), ("1 event of 2048 blocks", 1, 2048)] {
        for map in [true, false] {
            let payload = payload(events, blocks, map);
            let form = if map { "map" } else { "array" };
            let line = |what: &str, rounds: [f64; 9]| {
                let per_s = |n: usize, s: f64| n as f64 / s / 1e6;
                println!(
                    "{:34} {:>10.2} M {:>10.2} M {:>10.2} M",
                    format!("{name}, {form}: {what}"),
                    per_s(events, rounds[4]),
                    per_s(events * blocks, rounds[4]),
                    per_s(events * blocks, rounds[0]),
                );
                rounds[4]
            };
            let ours = line(
                "ours",
                measure(|| {
                    black_box(wire::decode(EngineKind::Vllm, black_box(&payload)).unwrap());
                }),
            );
            let mut resolver = Resolver::new(BlockSize::new(BLOCK as u32).unwrap());
            let (mut out, mut dropped) = (Vec::new(), Vec::new());
            line(
                "with resolve",
                measure(|| {
                    out.clear();
                    let batch = wire::decode(EngineKind::Vllm, black_box(&payload)).unwrap();
                    resolver.resolve(&batch, &mut out, &mut dropped);
                    black_box(&out);
                }),
            );
            assert!(dropped.is_empty() && out.len() == events);
            let theirs = line(
                "rmp-serde",
                measure(|| {
                    if map {
                        black_box(rmp_serde::from_slice::<Batch<MapEvent>>(black_box(&payload)).unwrap());
                    } else {
                        black_box(rmp_serde::from_slice::<Batch<ArrayEvent>>(black_box(&payload)).unwrap());
                    }
                }),
            );
            println!("{:34} {:>10.2} x", "", theirs / ours);
        }
    }
}
