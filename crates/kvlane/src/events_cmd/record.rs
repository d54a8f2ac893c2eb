//! `kvlane events record URL FILE`.
//!
//! The format is that of the recorded captures that the tests use: a `meta` line, then one `frames` line for each message with all
//! its frames in hex, exactly as they came.

use super::{next, seq_and_payload, sources, subscribe};
use anyhow::Context;
use futures_util::stream::{FuturesUnordered, StreamExt};
use kvlane_server::clock::unix_s;
use kvlane_server::fleet::Publisher;
use kvlane_server::ingest::{Tap, Tapped};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `kvlane events record`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  kvlane events record http://gpu1:8000 gpu1.jsonl --seconds 60 && kvlane events replay gpu1.jsonl")]
pub(crate) struct Args {
    /// The worker, as `--worker` takes it, or tcp://HOST:PORT of a publisher.
    source: String,
    /// The file to write; it must not exist.
    file: PathBuf,
    /// Stop after this time; without it, at Ctrl-C.
    #[arg(long)]
    seconds: Option<u64>,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let sources = sources(&args.source).await?;
    let file =
        File::create_new(&args.file).with_context(|| format!("cannot create {}", args.file.display()))?;
    let mut out = BufWriter::new(file);
    writeln!(out, "{}", json!({"kind": "meta", "format": "kv-capture/1", "engine": sources.engine.name()}))?;
    let mut messages = 0u64;
    let recording = async {
        // First listen, then ask for the past: a message may be in both, but none is in neither.
        let mut taps = FuturesUnordered::new();
        for (publisher, tap, first) in subscribe(&sources.publishers).await {
            if let Some(tapped) = first {
                messages += u64::from(write(&mut out, publisher, "pub", &tapped)?);
            }
            taps.push(next(publisher, tap));
        }
        for publisher in &sources.publishers {
            let Some(endpoint) = &publisher.replay else { continue };
            let mut tap = Tap::replay(endpoint, 0);
            while let Some(tapped) = tap.recv().await {
                messages += u64::from(write(&mut out, publisher, "replay", &tapped)?);
            }
        }
        while let Some((publisher, tap, tapped)) = taps.next().await {
            let Some(tapped) = tapped else { continue };
            messages += u64::from(write(&mut out, publisher, "pub", &tapped)?);
            taps.push(next(publisher, tap));
        }
        anyhow::Ok(())
    };
    let limit = async {
        match args.seconds {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = recording => ended?,
        () = limit => {}
        signal = tokio::signal::ctrl_c() => signal?,
    }
    out.flush()?;
    tracing::info!("{messages} messages in {}", args.file.display());
    Ok(())
}

/// Whether it was a message.
fn write(
    out: &mut impl Write,
    publisher: &Publisher,
    channel: &str,
    tapped: &Tapped,
) -> anyhow::Result<bool> {
    match tapped {
        Tapped::Message(frames) => {
            let hex: Vec<String> =
                frames.iter().map(|f| f.iter().map(|b| format!("{b:02x}")).collect()).collect();
            let seq = seq_and_payload(frames).map(|(seq, _)| seq);
            let line = json!({
                "kind": "frames", "t": unix_s(), "channel": channel, "source": format!("rank{}", publisher.rank),
                "frames_hex": hex, "seq": seq,
            });
            writeln!(out, "{line}")?;
            Ok(true)
        }
        Tapped::Connected => {
            writeln!(out, "{}", json!({"kind": "note", "t": unix_s(), "text": "connected"}))?;
            Ok(false)
        }
        Tapped::Lost(why) => {
            let text = format!("no connection: {why}");
            writeln!(out, "{}", json!({"kind": "note", "t": unix_s(), "text": text}))?;
            Ok(false)
        }
    }
}
