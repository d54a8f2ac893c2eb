//! What each capture says and what the index makes of it, as text that a person can review (`tests/golden`).
//!
//! Write them anew with `KVLANE_BLESS=1 cargo test -p kvlane-events --test goldens`, and read the difference.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod support;

use kvlane_events::drain::Drain;
use kvlane_events::stream::{Action, Input};
use kvlane_events::wire::{self, EngineKind, Stored, WireEvent};
use kvlane_index::{BlockSize, GroupKind, IndexConfig, KvEvent, Worker};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use support::{Follower, Line, captures, message, read, root};

fn engine_of(folder: &str) -> EngineKind {
    match folder.split_once('-').map_or(folder, |(engine, _)| engine) {
        "sglang" => EngineKind::Sglang,
        "trtllm" => EngineKind::TrtLlm,
        _ => EngineKind::Vllm,
    }
}

fn hex(hashes: impl IntoIterator<Item = u64>) -> String {
    hashes.into_iter().map(|h| format!("{h:016x}")).collect::<Vec<_>>().join(" ")
}

fn stored(event: &Stored<'_>) -> String {
    let Stored { hashes, parent, tokens, block_size, tier, group, group_kind, adapter, salt, media } = event;
    let mut line = format!("stored {} group {}", tier.name(), group.0);
    match group_kind {
        None => {}
        Some(GroupKind::Full) => line.push_str(" full"),
        Some(GroupKind::Sliding { window_tokens }) => write!(line, " window {window_tokens}").unwrap(),
        Some(GroupKind::Recurrent) => line.push_str(" recurrent"),
    }
    match parent {
        None => line.push_str(" at root"),
        Some(parent) => write!(line, " after {:016x}", parent.0).unwrap(),
    }
    if let Some(adapter) = adapter {
        write!(line, " adapter {adapter}").unwrap();
    }
    if let Some(salt) = salt {
        write!(line, " salt {salt}").unwrap();
    }
    for item in media {
        write!(line, " media {}@{}+{}", item.identifier, item.block, item.offset).unwrap();
    }
    // Long ranges by their ends: the hashes below say the rest.
    let tokens: String = match tokens.as_slice() {
        [a, b, .., y, z] if tokens.len() > 40 => format!("{a} {b} .. {y} {z} ({})", tokens.len()),
        _ => tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
    };
    write!(line, "\n    {}\n    tokens {tokens} in blocks of {block_size}", hex(hashes.iter().map(|h| h.0)))
        .unwrap();
    line
}

fn describe(file: &Path, engine: EngineKind) -> String {
    let lines = read(file);
    let mut block_size = 4;
    for line in &lines {
        if let Line::Meta(meta) = line {
            let said = meta["block_size"].as_u64().or(meta["page_size"].as_u64());
            block_size = said.unwrap_or(4) as u32;
        }
    }
    let (mut writer, index) = kvlane_index::partition(IndexConfig::new(BlockSize::new(block_size).unwrap()));
    let mut followers: BTreeMap<String, (Worker, Follower)> = BTreeMap::new();
    let mut published: BTreeMap<(String, u64), Vec<u8>> = BTreeMap::new();
    let mut out = String::new();
    for line in &lines {
        let Line::Frames { live, source, frames } = line else { continue };
        let (seq, payload) = message(frames);
        if !*live {
            if let Some(live) = published.get(&(source.clone(), seq)) {
                assert_eq!(live, payload, "a replayed batch is the published one");
            } else if !payload.is_empty() {
                wire::decode(engine, payload).expect("a replayed batch decodes");
            }
            continue;
        }
        published.insert((source.clone(), seq), payload.to_vec());
        let batch = wire::decode(engine, payload).expect("a recorded batch decodes");
        writeln!(out, "{source} {seq}: rank {:?}, at {:.3}", batch.dp_rank, batch.ts_s).unwrap();
        for event in &batch.events {
            let text = match event {
                WireEvent::Stored(event) => stored(event),
                WireEvent::Removed(event) => {
                    let names = hex(event.hashes.iter().map(|h| h.0));
                    format!("removed {} group {}\n    {names}", event.tier.name(), event.group.0)
                }
                WireEvent::Cleared => "cleared".into(),
            };
            writeln!(out, "  {text}").unwrap();
        }
        let number = followers.len() as u32;
        let (worker, follower) = followers.entry(source.clone()).or_insert_with(|| {
            let mut follower = Follower::new(engine, block_size, BTreeMap::new());
            follower.input(Input::Connected);
            (Worker::new(1, number), follower)
        });
        for action in follower.live(frames) {
            match action {
                Action::Apply(event) => {
                    let _ = writer.apply(*worker, &event);
                }
                Action::Reset { epoch, .. } => {
                    let _ = writer.remove_worker(*worker);
                    writeln!(out, "  * epoch {epoch}").unwrap();
                }
                Action::Dropped(reason) => writeln!(out, "  * dropped: {}", reason.name()).unwrap(),
                Action::StateChanged(state) => writeln!(out, "  * {}", state.name()).unwrap(),
                Action::RequestSnapshot { .. } | Action::AdoptSnapshot | Action::DropSnapshot => {
                    unreachable!()
                }
                Action::RequestReplay { from_seq, .. } => {
                    writeln!(out, "  * replay from {from_seq}").unwrap();
                }
            }
        }
    }
    let mut drain = Drain::new(BlockSize::new(block_size).unwrap(), 10_000);
    for line in &lines {
        let Line::Drained(event) = line else { continue };
        writeln!(out, "drained {}", event["event_id"]).unwrap();
        let mut actions = Vec::new();
        let body = serde_json::to_vec(&[event]).unwrap();
        drain.handle(kvlane_events::drain::Input::Body(&body), 0, &mut actions);
        for (rank, action) in actions {
            writeln!(out, "  rank {rank}: {action:?}").unwrap();
        }
    }
    // Captures of a replay alone: what a router learns that starts then.
    let mut replayed: BTreeMap<String, BTreeMap<u64, Vec<u8>>> = BTreeMap::new();
    for line in &lines {
        let Line::Frames { live: false, source, frames } = line else { continue };
        let (seq, payload) = message(frames);
        if !followers.contains_key(source) && !payload.is_empty() {
            replayed.entry(source.clone()).or_default().insert(seq, payload.to_vec());
        }
    }
    for (source, retained) in replayed {
        let (first, last) = (*retained.keys().next().unwrap(), *retained.keys().last().unwrap());
        let mut follower = Follower::new(engine, block_size, retained);
        let worker = Worker::new(1, followers.len() as u32);
        for action in follower.input(Input::Connected) {
            if let Action::Apply(event) = action {
                let _ = writer.apply(worker, &event);
            }
        }
        writeln!(out, "{source}: {first} to {last} replayed, {}", follower.stream.state().name()).unwrap();
        followers.insert(source, (worker, follower));
    }
    for (source, (worker, _)) in &followers {
        writeln!(out, "index, {source}:").unwrap();
        let mut held = Vec::new();
        for event in index.dump(*worker) {
            let KvEvent::Stored { tier, group, parent, blocks } = event else { continue };
            let mut before = parent.map_or("root".into(), |p| format!("{:016x}", p.0));
            for block in blocks {
                let (name, content) = (format!("{:016x}", block.engine.0), block.block.0);
                held.push(format!(
                    "  {} group {} {before} > {name} = {content:016x}",
                    tier.name(),
                    group.id.0
                ));
                before = name;
            }
        }
        // However the index orders its dump.
        held.sort();
        held.iter().for_each(|line| writeln!(out, "{line}").unwrap());
        writeln!(out, "  orphans: {}", index.stats().orphans).unwrap();
    }
    out
}

/// Compares every capture of a folder with its golden.
fn check(folder: &str) {
    #[expect(clippy::disallowed_methods, reason = "goldens are written on request only")]
    let bless = std::env::var_os("KVLANE_BLESS").is_some();
    for file in captures(folder) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let golden = root().join("golden").join(folder).join(format!("{name}.txt"));
        let text = describe(&file, engine_of(folder));
        if bless {
            std::fs::create_dir_all(golden.parent().unwrap()).unwrap();
            std::fs::write(&golden, text).unwrap();
        } else {
            let expected = std::fs::read_to_string(&golden).unwrap_or_default();
            assert!(text == expected, "{folder}/{name} differs from its golden:\n{text}");
        }
    }
}

#[test]
fn vllm_running() {
    check("vllm-0.32.0");
}

#[test]
fn vllm_versions() {
    check("vllm-versions");
}

#[test]
fn sglang_scenarios() {
    check("sglang-0.5.23");
}

#[test]
fn sglang_versions() {
    check("sglang-versions");
}

#[test]
fn trtllm_republished() {
    check("trtllm-dynamo-1.6.1");
}
