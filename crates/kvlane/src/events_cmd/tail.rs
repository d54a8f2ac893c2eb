//! `kvlane events tail URL`.

use super::{next, on_the_wire, print, seq_and_payload, sources, subscribe};
use futures_util::stream::{FuturesUnordered, StreamExt};
use kvlane_events::wire::{self, WireEvent};
use kvlane_index::EngineHash;
use kvlane_server::fleet::Publisher;
use kvlane_server::ingest::{Tap, Tapped};
use serde_json::{Value, json};

/// Hashes shown of one event.
const HASHES_SHOWN: usize = 3;

/// Arguments of `kvlane events tail`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvlane events tail http://gpu1:8000                 asks the engine where it publishes
  kvlane events tail tcp://gpu1:5557                  a publisher, without asking
  kvlane events tail http://gpu1:8000 --json | jq -c '.events[] | select(.type == \"removed\")'")]
pub(crate) struct Args {
    /// The worker, as `--worker` takes it, or tcp://HOST:PORT of a publisher.
    source: String,
    /// One JSON object for each batch, instead of text. Tokens are counted, not shown.
    #[arg(long)]
    json: bool,
    /// First show what the engine still has of the past.
    #[arg(long)]
    from_start: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let sources = sources(&args.source).await?;
    let engine = on_the_wire(sources.engine);
    let mut taps = FuturesUnordered::new();
    for (publisher, tap, first) in subscribe(&sources.publishers).await {
        if let Some(tapped) = first {
            show(publisher, &tapped, engine, args.json)?;
        }
        taps.push(next(publisher, tap));
    }
    // What is published meanwhile waits, and is shown again after the past if it is in both.
    for publisher in sources.publishers.iter().filter(|_| args.from_start) {
        let Some(endpoint) = &publisher.replay else { continue };
        let mut tap = Tap::replay(endpoint, 0);
        while let Some(tapped) = tap.recv().await {
            show(publisher, &tapped, engine, args.json)?;
        }
    }
    while let Some((publisher, tap, tapped)) = taps.next().await {
        let Some(tapped) = tapped else { continue };
        show(publisher, &tapped, engine, args.json)?;
        taps.push(next(publisher, tap));
    }
    Ok(())
}

fn show(
    publisher: &Publisher,
    tapped: &Tapped,
    engine: wire::EngineKind,
    as_json: bool,
) -> anyhow::Result<()> {
    let rank = publisher.rank;
    let frames = match tapped {
        Tapped::Message(frames) => frames,
        Tapped::Connected if as_json => return print(&json!({"rank": rank, "connected": true}).to_string()),
        Tapped::Connected => return print(&format!("rank {rank} connected to {}", publisher.events)),
        Tapped::Lost(why) if as_json => {
            return print(&json!({"rank": rank, "connected": false, "why": why}).to_string());
        }
        Tapped::Lost(why) => {
            return print(&format!("rank {rank} no connection to {}: {why}", publisher.events));
        }
    };
    let Some((seq, payload)) = seq_and_payload(frames) else {
        return print(&format!("rank {rank} a message of {} frames that is no batch", frames.len()));
    };
    if payload.is_empty() {
        return Ok(());
    }
    let batch = match wire::decode(engine, payload) {
        Ok(batch) => batch,
        Err(reason) if as_json => {
            return print(&json!({"rank": rank, "seq": seq, "dropped": reason.name()}).to_string());
        }
        Err(reason) => return print(&format!("rank {rank} seq {seq} not decoded: {}", reason.name())),
    };
    if as_json {
        let events: Vec<Value> = batch.events.iter().map(to_json).collect();
        let dropped: Vec<&str> = batch.dropped.iter().map(|reason| reason.name()).collect();
        return print(
            &json!({"rank": rank, "seq": seq, "ts": batch.ts_s, "events": events, "dropped": dropped})
                .to_string(),
        );
    }
    for event in &batch.events {
        print(&format!("rank {rank} seq {seq} {}", to_text(event)))?;
    }
    for reason in &batch.dropped {
        print(&format!("rank {rank} seq {seq} an event was not used: {}", reason.name()))?;
    }
    Ok(())
}

fn hex(hash: EngineHash) -> String {
    format!("{:016x}", hash.0)
}

fn to_json(event: &WireEvent<'_>) -> Value {
    let all = |hashes: &[EngineHash]| hashes.iter().map(|h| hex(*h)).collect::<Vec<_>>();
    match event {
        WireEvent::Stored(stored) => json!({
            "type": "stored", "tier": stored.tier.name(), "group": stored.group.0, "hashes": all(&stored.hashes),
            "parent": stored.parent.map(hex), "tokens": stored.tokens.len(), "block_size": stored.block_size,
            "adapter": stored.adapter, "salted": stored.salt.is_some(), "media": stored.media.len(),
        }),
        WireEvent::Removed(removed) => json!({
            "type": "removed", "tier": removed.tier.name(), "group": removed.group.0, "hashes": all(&removed.hashes),
        }),
        WireEvent::Cleared => json!({"type": "cleared"}),
    }
}

fn to_text(event: &WireEvent<'_>) -> String {
    let some = |hashes: &[EngineHash]| {
        let shown: Vec<String> = hashes.iter().take(HASHES_SHOWN).map(|h| hex(*h)).collect();
        let more = if hashes.len() > HASHES_SHOWN { " …" } else { "" };
        format!("{}{more}", shown.join(" "))
    };
    match event {
        WireEvent::Stored(stored) => {
            let after =
                stored.parent.map_or_else(|| "at the root".to_owned(), |p| format!("after {}", hex(p)));
            let adapter = stored.adapter.as_ref().map(|name| format!(", adapter {name}")).unwrap_or_default();
            let salt = if stored.salt.is_some() { ", salted" } else { "" };
            format!(
                "stored  {} blocks ({} tokens of {}) {after} in {}, group {}{adapter}{salt}: {}",
                stored.hashes.len(),
                stored.tokens.len(),
                stored.block_size,
                stored.tier.name(),
                stored.group.0,
                some(&stored.hashes),
            )
        }
        WireEvent::Removed(removed) => format!(
            "removed {} blocks from {}, group {}: {}",
            removed.hashes.len(),
            removed.tier.name(),
            removed.group.0,
            some(&removed.hashes),
        ),
        WireEvent::Cleared => "cleared everything".to_owned(),
    }
}
