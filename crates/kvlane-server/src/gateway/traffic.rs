//! `GET /kvlane/traffic`: the requests that pass, as lengths, times and hashes, one JSON line each as it ends; for `kvlane record`.
//!
//! Nothing of what was said is in it. Each id stands for a whole beginning of a prompt and is salted with a number that this process drew at its start, so
//! equal beginnings have equal ids and an id tells nothing to who does not know the salt. Times are in milliseconds since the recording began, requests that came
//! before it are left out.
//!
//! Costs nothing while nobody records. A recorder that reads too slowly is told how many lines it lost.

use super::body::ResponseBody;
use super::error::ClientError;
use super::{Gateway, PromptBlocks, Response};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use kvlane_index::BlockHash;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Requests that a recorder may be behind.
const BEHIND_MAX: usize = 1024;
/// Lines on their way to one recorder.
const LINES_MAX: usize = 64;
/// A shutdown ends a recording within this time.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Ids are numbers that every JSON reader holds exactly.
const ID_BITS: u32 = 53;

/// A request that ended.
#[derive(Debug)]
pub(super) struct Passed {
    pub arrived: Instant,
    pub model: Option<String>,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// `None` where its tokens are not known.
    pub blocks: Option<PromptBlocks>,
    pub cached_tokens: Option<u64>,
    pub first_byte_ms: Option<f64>,
    pub outcome: &'static str,
}

/// The way from requests that end to whoever records.
#[derive(Debug)]
pub(super) struct Traffic {
    passed: broadcast::Sender<Arc<Passed>>,
    salt: u64,
}

impl Traffic {
    pub(super) fn new(salt: u64) -> Self {
        Self { passed: broadcast::Sender::new(BEHIND_MAX), salt }
    }

    /// Tells of a request that ended; it is described only if somebody records.
    pub(super) fn tell(&self, describe: impl FnOnce() -> Passed) {
        if self.passed.receiver_count() > 0 {
            // The last recorder may have left just now.
            let _ = self.passed.send(Arc::new(describe()));
        }
    }
}

#[derive(Deserialize)]
struct Which {
    /// Only requests for this model.
    model: Option<String>,
    /// Tokens that an id stands for, rounded up to whole blocks; the engine's blocks where absent.
    tokens_per_id: Option<u32>,
}

impl Gateway {
    /// Every request that ends from now on.
    pub(super) fn record(self: &Arc<Self>, query: &str) -> Result<Response, ClientError> {
        let Which { model, tokens_per_id } = serde_urlencoded::from_str(query).map_err(|_| {
            ClientError::bad_request(
                "`tokens_per_id` must be a number; `model` a name. Nothing else is known here.",
            )
        })?;
        let began = Instant::now();
        let mut passed = self.traffic.passed.subscribe();
        let (lines, out) = mpsc::channel(LINES_MAX);
        let gateway = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let line = tokio::select! {
                    one = passed.recv() => match one {
                        Ok(one) if one.arrived < began || model.is_some() && model != one.model => continue,
                        Ok(one) => describe(&one, began, tokens_per_id, gateway.traffic.salt),
                        Err(RecvError::Lagged(lost)) => json!({ "lost": lost }),
                        Err(RecvError::Closed) => return,
                    },
                    () = tokio::time::sleep(LOOK_EVERY) => {
                        if lines.is_closed() || gateway.is_draining() {
                            return;
                        }
                        continue;
                    }
                };
                if lines.send(Bytes::from(format!("{line}\n"))).await.is_err() {
                    return;
                }
            }
        });
        let mut response = Response::new(ResponseBody::Lines(out));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
        Ok(response)
    }
}

/// One line in the fields of Mooncake's traces, and a few that their readers pass over.
fn describe(passed: &Passed, began: Instant, tokens_per_id: Option<u32>, salt: u64) -> Value {
    let Passed { arrived, model, input_tokens, output_tokens, blocks, cached_tokens, first_byte_ms, outcome } =
        passed;
    let (block_size, ids) = match blocks {
        None => (None, Vec::new()),
        Some(PromptBlocks { hashes, block_size, .. }) => {
            let per_id = tokens_per_id.unwrap_or(1).div_ceil(*block_size).max(1);
            (Some(per_id.saturating_mul(*block_size)), salted(hashes, per_id as usize, salt))
        }
    };
    let mut line = json!({
        "timestamp": ((*arrived - began).as_secs_f64() * 1e6).round() / 1e3,
        "input_length": input_tokens,
        "output_length": output_tokens,
        "hash_ids": ids,
        "model": model,
        "cached_tokens": cached_tokens,
        "ttft_ms": first_byte_ms.map(|ms| (ms * 1e3).round() / 1e3),
        "outcome": outcome,
    });
    if let Some(block_size) = block_size {
        line["block_size"] = json!(block_size);
    }
    line
}

/// One id for each `per_id` whole blocks; it stands for the prompt up to their end.
fn salted(hashes: &[BlockHash], per_id: usize, salt: u64) -> Vec<u64> {
    let mut chain = salt;
    let mut ids = Vec::with_capacity(hashes.len() / per_id);
    for group in hashes.chunks_exact(per_id) {
        for hash in group {
            chain = xxh3_64_with_seed(&hash.0.to_le_bytes(), chain);
        }
        ids.push(xxh3_64_with_seed(&salt.to_le_bytes(), chain) >> (u64::BITS - ID_BITS));
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_beginnings_have_equal_ids_under_one_salt_only() {
        let prompt: Vec<BlockHash> = (0..9).map(BlockHash).collect();
        let mut other = prompt.clone();
        other[4] = BlockHash(77);
        let (a, b) = (salted(&prompt, 2, 1), salted(&other, 2, 1));
        assert_eq!((a.len(), &a[..2]), (4, &b[..2]), "the ninth block is no whole id");
        assert!(a[2] != b[2] && a[3] != b[3], "what follows a difference differs");
        assert!(salted(&prompt, 2, 2).iter().all(|id| !a.contains(id)));
        assert!(a.iter().all(|id| *id < 1 << ID_BITS));
        assert_eq!(salted(&prompt, 1, 1)[3], a[1], "an id depends on the prompt up to its end only");
    }
}
