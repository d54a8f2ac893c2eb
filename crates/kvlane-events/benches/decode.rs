//! How fast are payloads decoded, tokens materialised as u32 and bounds-checked?
//!
//! Workloads: batches of 64 events of one block, and one event of 2,048 blocks, 16 tokens a block, in vLLM's map form (0.24 and later) and
//! array form; token ids drawn evenly from a vocabulary of 128k, so that their widths alternate at random (the worst case for a branch on the width).
//! Contenders, in one process, their rounds interleaved:
//!
//! * `decode`: [`kvlane_events::wire::Decoder`] as a stream uses it, which borrows strings and keeps everything that a version may say;
//! * `+ resolve`: the same with its blocks hashed into index events, which is what ingest does;
//! * `rmp-serde`: `rmp_serde::from_slice` into plain owned structs with the same fields, which takes no other form than the one it was written
//!   for and gives up the batch at the first surprise;
//! * `rmp-serde, borrowed`: the same with `&str` instead of `String`.
//!
//! One thread; the median of 15 rounds of at least 60 ms *of this thread's CPU time* (from `/proc/thread-self/schedstat`), so that a busy
//! machine does not count. Prints a Markdown table (`cargo xtask bench events` keeps it in BENCHMARKS.md).
//!
//! `cargo bench -p kvlane-events --bench decode [-- --quick]`

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods, reason = "a bench")]
#![allow(missing_docs, dead_code, reason = "the opponent's structs are only filled")]

use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{Decoder, EngineKind};
use kvlane_index::BlockSize;
use serde::Deserialize;
use std::hint::black_box;

const BLOCK: usize = 16;

#[derive(Deserialize)]
struct MapEvent<S> {
    r#type: S,
    #[serde(default)]
    block_hashes: Vec<u64>,
    parent_block_hash: Option<u64>,
    #[serde(default)]
    token_ids: Vec<u32>,
    #[serde(default)]
    block_size: u32,
    lora_id: Option<i64>,
    medium: Option<S>,
    lora_name: Option<S>,
    extra_keys: Option<Vec<Option<Vec<S>>>>,
    group_idx: Option<u32>,
    kv_cache_spec_kind: Option<S>,
}

#[derive(Deserialize)]
struct ArrayEvent<S>(
    S,
    Vec<u64>,
    Option<u64>,
    Vec<u32>,
    u32,
    Option<i64>,
    Option<S>,
    Option<S>,
    Option<Vec<Option<Vec<S>>>>,
    Option<u32>,
    Option<S>,
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

/// Seconds of one pass, over one round.
fn round(round_s: f64, once: &mut dyn FnMut()) -> f64 {
    let start = cpu_s();
    let mut passes = 0u32;
    loop {
        for _ in 0..64 {
            once();
        }
        passes += 64;
        let spent = cpu_s() - start;
        if spent >= round_s {
            return spent / f64::from(passes);
        }
    }
}

/// Median, and half the range in per cent of it.
fn median(mut rounds: Vec<f64>) -> (f64, f64) {
    rounds.sort_by(f64::total_cmp);
    let median = rounds[rounds.len() / 2];
    (median, (rounds[rounds.len() - 1] - rounds[0]) / 2.0 / median * 100.0)
}

/// One payload decoded over and over, for a profiler: `--profile map|array`.
fn profile(map: bool) {
    let payload = payload(64, 1, map);
    let mut decoder = Decoder::default();
    for _ in 0..2000 {
        let batch = decoder.decode(EngineKind::Vllm, black_box(&payload)).unwrap();
        decoder.recycle(black_box(batch));
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--profile") {
        return profile(args.get(at + 1).is_none_or(|form| form == "map"));
    }
    let quick = std::env::args().any(|a| a == "--quick");
    let (rounds, round_s) = if quick { (5, 0.02) } else { (15, 0.06) };
    println!(
        "| payload | form | decode, M events/s | M blocks/s | + resolve, M events/s | M blocks/s | rmp-serde, M events/s | rmp-serde, borrowed \
         | decode / rmp-serde | decode / borrowed | spread |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (name, events, blocks) in [("64 events of 1 block", 64, 1), ("1 event of 2,048 blocks", 1, 2048)] {
        for map in [true, false] {
            let payload = payload(events, blocks, map);
            let mut resolver = Resolver::new(BlockSize::new(BLOCK as u32).unwrap());
            let (mut out, mut dropped) = (Vec::new(), Vec::new());
            let (mut one, mut two) = (Decoder::default(), Decoder::default());
            let mut decode = || {
                let batch = one.decode(EngineKind::Vllm, black_box(&payload)).unwrap();
                one.recycle(black_box(batch));
            };
            let mut resolve = || {
                out.clear();
                let batch = two.decode(EngineKind::Vllm, black_box(&payload)).unwrap();
                resolver.resolve(&batch, &mut out, &mut dropped);
                assert!(dropped.is_empty() && out.len() == events);
                two.recycle(batch);
                black_box(&out);
            };
            let mut owned = || {
                if map {
                    black_box(rmp_serde::from_slice::<Batch<MapEvent<String>>>(black_box(&payload)).unwrap());
                } else {
                    black_box(
                        rmp_serde::from_slice::<Batch<ArrayEvent<String>>>(black_box(&payload)).unwrap(),
                    );
                }
            };
            let mut borrowed = || {
                if map {
                    black_box(rmp_serde::from_slice::<Batch<MapEvent<&str>>>(black_box(&payload)).unwrap());
                } else {
                    black_box(rmp_serde::from_slice::<Batch<ArrayEvent<&str>>>(black_box(&payload)).unwrap());
                }
            };
            let mut contenders: [&mut dyn FnMut(); 4] =
                [&mut decode, &mut resolve, &mut owned, &mut borrowed];
            let mut times = [const { Vec::new() }; 4];
            for _ in 0..rounds {
                for (once, times) in contenders.iter_mut().zip(&mut times) {
                    times.push(round(round_s, *once));
                }
            }
            let [decode, resolve, owned, borrowed] = times.map(median);
            let per_s = |n: usize, s: f64| n as f64 / s / 1e6;
            let spread =
                [decode, resolve, owned, borrowed].into_iter().fold(0.0, |worst, (_, s)| s.max(worst));
            println!(
                "| {name} | {} | {:.2} | {:.1} | {:.2} | {:.1} | {:.2} | {:.2} | {:.1} × | {:.1} × | {spread:.0} % |",
                if map { "map" } else { "array" },
                per_s(events, decode.0),
                per_s(events * blocks, decode.0),
                per_s(events, resolve.0),
                per_s(events * blocks, resolve.0),
                per_s(events, owned.0),
                per_s(events, borrowed.0),
                owned.0 / decode.0,
                borrowed.0 / decode.0,
            );
        }
    }
}
