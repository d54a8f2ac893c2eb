//! `kvlane record`: live traffic as hashes and lengths only, so that users simulate their own.
//!
//! The router salts and describes (`GET /kvlane/traffic`); this only keeps the lines that a trace can hold and counts the others. What is in the file
//! at any moment can be read: it is written line by line.

use crate::replay::client::Client;
use anyhow::Context;
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::Value;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Longest line, with what came after it: some three million numbers.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Arguments of `kvlane record`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A line holds the time, the lengths of prompt and answer, one salted number for each beginning of the prompt, and what was measured.
No text, no tokens, no keys; the salt is drawn anew by each start of the router.

Example: what would other policies, and six instead of eight GPUs, have done with the last hour?
  kvlane record http://router:8080 hour.jsonl --seconds 3600
  kvlane simulate hour.jsonl --workers 6,8 --compare")]
pub(crate) struct Args {
    /// The router, such as http://10.0.0.1:8080.
    router: String,
    /// The file to write; it must not exist.
    file: PathBuf,
    /// Stop after this time; without it, at Ctrl-C.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Stop after so many requests.
    #[arg(long, value_name = "COUNT")]
    requests: Option<u64>,
    /// Only requests for this model. Needed where models differ in their block size: a trace has one.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Tokens that one number stands for, rounded up to whole blocks: 512 makes files some 30 times smaller than the engines' own 16.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens_per_id: Option<u32>,
}

#[cfg(test)]
impl Args {
    /// Records so many requests.
    pub(crate) fn of(router: &str, file: &std::path::Path, requests: u64) -> Self {
        Self {
            router: router.to_owned(),
            file: file.to_owned(),
            seconds: None,
            requests: Some(requests),
            model: None,
            tokens_per_id: None,
        }
    }
}

/// What was kept and what was not.
#[derive(Debug, Default)]
struct Counts {
    kept: u64,
    /// Kept without ids: the router does not know their tokens.
    without_ids: u64,
    other_block_size: u64,
    lost: u64,
}

/// Records until it is told to stop.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args { router, file: path, seconds, requests, model, tokens_per_id } = args;
    let mut query = String::new();
    for (name, value) in [("model", model), ("tokens_per_id", tokens_per_id.map(|n| n.to_string()))] {
        if let Some(value) = value {
            query.push(if query.is_empty() { '?' } else { '&' });
            query.push_str(name);
            query.push('=');
            value.bytes().for_each(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => query.push(char::from(byte)),
                _ => query.push_str(&format!("%{byte:02X}")),
            });
        }
    }
    let client = Client::new(&router)?;
    let response = client.send(Method::GET, &format!("/kvlane/traffic{query}"), &[], None).await?;
    let status = response.status();
    anyhow::ensure!(
        status.is_success(),
        "{router} answers {status} to /kvlane/traffic: is it a kvlane router of this version?"
    );
    let file = File::create_new(&path)
        .with_context(|| format!("cannot create {}; name a file that does not exist yet", path.display()))?;
    let mut out = BufWriter::new(file);
    let mut counts = Counts::default();
    tracing::info!("recording to {}; Ctrl-C ends it", path.display());
    let recording = async {
        let mut body = response.into_body();
        let mut unread: Vec<u8> = Vec::new();
        let mut block_size = None;
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the router broke off")?;
            unread.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
            anyhow::ensure!(unread.len() <= LINE_BYTES_MAX, "the router sent a line of more than 64 MiB");
            while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = unread.drain(..=end).collect();
                keep(&line, &mut block_size, &mut counts, &mut out)?;
                if requests.is_some_and(|most| counts.kept >= most) {
                    return Ok(());
                }
            }
            // Whoever looks into the file sees whole lines.
            out.flush()?;
        }
        anyhow::Ok(())
    };
    let limit = async {
        match seconds {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = recording => ended,
        () = limit => Ok(()),
        signal = crate::serve::told_to_stop() => signal.context("cannot listen for signals"),
    };
    out.flush()?;
    let Counts { kept, without_ids, other_block_size, lost } = counts;
    tracing::info!("{kept} requests in {}", path.display());
    if without_ids > 0 {
        tracing::warn!(
            "of {without_ids} the router does not know the tokens: they share nothing in the trace (see `tokens_unknown_because` in /kvlane/explain)"
        );
    }
    if other_block_size > 0 {
        tracing::warn!(
            "{other_block_size} were left out, of models with another block size: name one with --model"
        );
    }
    if lost > 0 {
        tracing::warn!("{lost} were lost: they came faster than they could be written");
    }
    ended
}

fn keep(
    line: &[u8],
    block_size: &mut Option<u64>,
    counts: &mut Counts,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let row: Value = serde_json::from_slice(line).context("the router sent a line that is no JSON")?;
    if let Some(lost) = row["lost"].as_u64() {
        counts.lost += lost;
        return Ok(());
    }
    match row["block_size"].as_u64() {
        Some(size) if *block_size.get_or_insert(size) != size => {
            counts.other_block_size += 1;
            return Ok(());
        }
        Some(_) => {}
        None => counts.without_ids += 1,
    }
    counts.kept += 1;
    out.write_all(line)?;
    Ok(())
}
