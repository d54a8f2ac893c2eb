//! `kvlane events replay FILE`: a recorded stream into an index, or out on a socket.

use super::print;
use anyhow::Context;
use bytes::Bytes;
use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{self, EngineKind, WireEvent};
use kvlane_index::{Applied, BlockSize, IndexConfig, Worker};
use kvlane_server::config::Endpoint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

/// The longest pause between two messages that is kept when playing out on a socket.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Arguments of `kvlane events replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvlane events replay gpu1.jsonl                            into an index: what was used, and what each rank holds at the end
  kvlane events replay gpu1.jsonl --to tcp://127.0.0.1:5557  out on a socket, for a router with
                                                             --worker URL,kv-events=tcp://127.0.0.1:5557,replay=none")]
pub(crate) struct Args {
    /// A file written by `kvlane events record`.
    file: PathBuf,
    /// Publish on this endpoint (tcp://*:PORT binds all interfaces), at the recorded pace, instead of filling an index.
    #[arg(long, value_name = "ENDPOINT")]
    to: Option<Endpoint>,
    /// Wait this long for subscribers before the first message.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "to")]
    wait: f64,
    /// Tokens in a block; without it, as the first stored event says.
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
}

/// One recorded message.
struct Recorded {
    source: String,
    at_s: f64,
    frames: Vec<Bytes>,
    seq: u64,
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let (engine, messages) = load(args)?;
    match &args.to {
        Some(endpoint) => {
            publish(&messages, endpoint, Duration::from_secs_f64(args.wait.clamp(0.0, 3600.0))).await
        }
        None => fill(engine, &messages, args.block_size),
    }
}

/// All batches of the file by source, each number once, in the order of the file.
fn load(args: &Args) -> anyhow::Result<(EngineKind, Vec<Recorded>)> {
    let text = std::fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read {}", args.file.display()))?;
    let mut engine = EngineKind::Vllm;
    let mut messages: Vec<Recorded> = Vec::new();
    let mut last: BTreeMap<String, u64> = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Value =
            serde_json::from_str(line).with_context(|| format!("line {} is no JSON", number + 1))?;
        if line["kind"] == "meta" {
            engine = match line["engine"].as_str() {
                Some("sglang") => EngineKind::Sglang,
                Some(name) if name.starts_with("t") => EngineKind::TrtLlm,
                _ => EngineKind::Vllm,
            };
        }
        if line["kind"] != "frames" {
            continue;
        }
        let frames = line["frames_hex"].as_array().map(Vec::as_slice).unwrap_or_default();
        let frames: Option<Vec<Bytes>> = frames.iter().map(|f| unhex(f.as_str()?)).collect();
        let frames = frames.with_context(|| format!("line {}: frames_hex is no list of hex", number + 1))?;
        let Some((seq, payload)) = super::seq_and_payload(&frames) else { continue };
        if payload.is_empty() {
            continue;
        }
        let source = line["source"].as_str().unwrap_or_default().to_owned();
        // A replay at the start of a recording overlaps what came live; a number that falls back to 0 is another life.
        if last.get(&source).is_some_and(|last| seq <= *last && seq != 0) {
            continue;
        }
        last.insert(source.clone(), seq);
        messages.push(Recorded { source, at_s: line["t"].as_f64().unwrap_or_default(), frames, seq });
    }
    anyhow::ensure!(!messages.is_empty(), "{} contains no event batches", args.file.display());
    Ok((engine, messages))
}

fn unhex(text: &str) -> Option<Bytes> {
    let digits = text.as_bytes();
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

async fn publish(messages: &[Recorded], endpoint: &Endpoint, wait: Duration) -> anyhow::Result<()> {
    let mut socket = PubSocket::new();
    let host = if endpoint.host == "*" { "0.0.0.0" } else { &endpoint.host };
    let bound = socket
        .bind(&Endpoint::new(host, endpoint.port).to_string())
        .await
        .with_context(|| format!("cannot bind {endpoint}"))?;
    print(&format!("publishing {} batches on {bound}", messages.len()))?;
    tokio::time::sleep(wait).await;
    let mut before_s = messages.first().map_or(0.0, |m| m.at_s);
    for message in messages {
        let pause = Duration::try_from_secs_f64(message.at_s - before_s).unwrap_or_default().min(PAUSE_MAX);
        before_s = message.at_s;
        tokio::time::sleep(pause).await;
        let [.., seq, payload] = &message.frames[..] else { continue };
        // A replayed message has a delimiter in front, and before vLLM 0.26 no topic.
        let topic = if message.frames.len() >= 3 {
            message.frames[message.frames.len() - 3].clone()
        } else {
            Bytes::new()
        };
        let frames = ZmqMessage::try_from(vec![topic, seq.clone(), payload.clone()])
            .map_err(|_| anyhow::anyhow!("a message without frames"))?;
        socket.send(frames).await.context("cannot publish")?;
    }
    // Give the last message time to leave the socket, which has no linger.
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}

fn fill(engine: EngineKind, messages: &[Recorded], block_size: Option<u32>) -> anyhow::Result<()> {
    let size = match block_size {
        Some(tokens) => tokens,
        None => messages
            .iter()
            .find_map(|m| first_block_size(engine, m))
            .context("no stored event says its block size: set --block-size TOKENS")?,
    };
    let size = BlockSize::new(size).context("--block-size must be at least 1")?;
    let (mut writer, index) = kvlane_index::partition(IndexConfig::new(size));
    let mut ranks: BTreeMap<&str, Rank> = BTreeMap::new();
    for message in messages {
        let count = u32::try_from(ranks.len()).unwrap_or(u32::MAX);
        let rank = ranks.entry(&message.source).or_insert_with(|| Rank::new(count, size));
        let mut events = Vec::new();
        match super::seq_and_payload(&message.frames).map(|(_, payload)| wire::decode(engine, payload)) {
            Some(Ok(batch)) => {
                let mut reasons = batch.dropped.clone();
                rank.resolver.resolve(&batch, &mut events, &mut reasons);
                for reason in reasons {
                    *rank.dropped.entry(reason.name()).or_default() += 1;
                }
            }
            Some(Err(reason)) => *rank.dropped.entry(reason.name()).or_default() += 1,
            None => {}
        }
        if rank.batches > 0 && message.seq != rank.next {
            rank.holes += 1;
        }
        rank.next = message.seq.wrapping_add(1);
        rank.batches += 1;
        for event in &events {
            rank.applied += writer.apply(rank.worker, event);
        }
        rank.events += events.len();
    }
    for (source, rank) in &ranks {
        print(&format!(
            "{source}: {} batches, {} events, {} holes in the sequence",
            rank.batches, rank.events, rank.holes
        ))?;
        print(&format!("  {:?}", rank.applied))?;
        for (reason, count) in &rank.dropped {
            print(&format!("  not used: {count} × {reason}"))?;
        }
    }
    for held in index.workers() {
        let name = ranks.iter().find(|(_, r)| r.worker == held.worker).map_or("", |(name, _)| *name);
        print(&format!(
            "{name} holds {} blocks in {}, group {}",
            held.blocks,
            held.tier.name(),
            held.group.id.0
        ))?;
    }
    let stats = index.stats();
    print(&format!("index: {} places, {} orphans, {} bytes", stats.places, stats.orphans, stats.bytes))
}

fn first_block_size(engine: EngineKind, message: &Recorded) -> Option<u32> {
    let (_, payload) = super::seq_and_payload(&message.frames)?;
    let batch = wire::decode(engine, payload).ok()?;
    batch.events.iter().find_map(|event| match event {
        WireEvent::Stored(stored) if stored.block_size > 0 => Some(stored.block_size),
        _ => None,
    })
}

/// One recorded source, as a rank of the index.
struct Rank {
    worker: Worker,
    resolver: Resolver,
    batches: u64,
    events: usize,
    holes: u64,
    next: u64,
    applied: Applied,
    dropped: BTreeMap<&'static str, u64>,
}

impl Rank {
    fn new(rank: u32, block_size: BlockSize) -> Self {
        Self {
            worker: Worker::new(0, rank),
            resolver: Resolver::new(block_size),
            batches: 0,
            events: 0,
            holes: 0,
            next: 0,
            applied: Applied::default(),
            dropped: BTreeMap::new(),
        }
    }
}
