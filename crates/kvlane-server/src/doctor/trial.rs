//! The same new prompt twice: what is published after the first, and what is reported as cached of the second?

use super::{LIMIT, Report, cached_tokens_flag};
use crate::clock;
use crate::config::WorkerSpec;
use crate::fleet::probe::post;
use crate::fleet::{EngineKind, Facts, Publisher};
use crate::ingest::{Tap, Tapped};
use bytes::Bytes;
use kvlane_events::wire::{self, WireEvent};
use serde_json::{Value, json};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// Whole blocks in the prompt.
const BLOCKS: u32 = 2;
/// Publishing later than this after the response leaves a window in which equal prompts miss each other.
const LATE: Duration = Duration::from_millis(500);
/// Clocks further apart than this make lag figures useless.
const CLOCK_APART_S: f64 = 2.0;

pub(super) async fn run(spec: &WorkerSpec, facts: &Facts, report: &mut Report) {
    let block = facts.block_size.tokens();
    let wanted = u64::from(block * BLOCKS + 1);
    if facts.models.first().and_then(|m| m.max_model_len).is_some_and(|max| max < wanted + 1) {
        return report.hint("trial", "skipped: the model is shorter than two blocks", "");
    }
    for rank in 0..facts.ranks {
        // Low token ids are in every vocabulary; random ones are in no cache.
        let random = RandomState::new();
        let tokens: Vec<u64> = (0..wanted).map(|i| 10 + random.hash_one(i) % 200).collect();
        let body = json!({"model": facts.base_model(), "prompt": tokens, "max_tokens": 1, "temperature": 0});
        let publisher = facts.publishers.iter().find(|p| p.rank == rank);
        let mut tap = match publisher {
            Some(publisher) => connected(publisher).await,
            None => None,
        };
        if let Err(why) = ask(spec, &body, rank).await {
            report.problem(
                "trial",
                format!("rank {rank}: a prompt of {wanted} token ids is refused: {why}"),
                "",
            );
            continue;
        }
        let answered = Instant::now();
        if let (Some(publisher), Some(tap)) = (publisher, &mut tap) {
            match tokio::time::timeout(LIMIT, find(tap, facts.engine, publisher, &tokens)).await {
                Ok(Some(found)) => judge(&found, answered, rank, block, report),
                Ok(None) | Err(_) => report.problem(
                    "trial",
                    format!(
                        "rank {rank}: a new prompt was computed, but no event with its tokens came from {}",
                        publisher.events
                    ),
                    "check that this endpoint belongs to this engine: --worker URL,kv-events=tcp://HOST:PORT",
                ),
            }
        }
        match ask(spec, &body, rank).await {
            Err(why) => {
                report.problem("trial", format!("rank {rank}: the same prompt again is refused: {why}"), "");
            }
            Ok(response) => cached(&response, u64::from(block * BLOCKS), rank, facts.engine, report),
        }
    }
}

async fn connected(publisher: &Publisher) -> Option<Tap> {
    let mut tap = Tap::subscribe(&publisher.events, publisher.topic.as_deref().unwrap_or_default());
    match tokio::time::timeout(LIMIT, tap.recv()).await {
        Ok(Some(Tapped::Connected)) => {
            // A publisher takes a moment to take note of a subscription, and does not say when it has.
            tokio::time::sleep(Duration::from_millis(200)).await;
            Some(tap)
        }
        _ => None,
    }
}

async fn ask(spec: &WorkerSpec, body: &Value, rank: u32) -> Result<Value, String> {
    let answer = post(&spec.base, "/v1/completions", body, rank, LIMIT).await.map_err(|e| e.to_string())?;
    answer.json().ok_or_else(|| format!("POST /v1/completions says {}", answer.status))
}

/// What was published of the prompt.
struct Found {
    block_size: u32,
    heard: Instant,
    heard_unix_s: f64,
    published_s: f64,
    topic: String,
    other_topic: bool,
}

async fn find(tap: &mut Tap, engine: EngineKind, publisher: &Publisher, tokens: &[u64]) -> Option<Found> {
    let engine = match engine {
        EngineKind::Vllm | EngineKind::Other => wire::EngineKind::Vllm,
        EngineKind::Sglang => wire::EngineKind::Sglang,
        EngineKind::TensorRtLlm => wire::EngineKind::TrtLlm,
    };
    loop {
        let Tapped::Message(frames) = tap.recv().await? else { continue };
        let [topic, _, payload] = &frames[..] else { continue };
        let Ok(batch) = wire::decode(engine, payload) else { continue };
        for event in &batch.events {
            let WireEvent::Stored(stored) = event else { continue };
            if stored.block_size == 0 || !begins(tokens, &stored.tokens) {
                continue;
            }
            return Some(Found {
                block_size: stored.block_size,
                heard: Instant::now(),
                heard_unix_s: clock::unix_s(),
                published_s: batch.ts_s,
                topic: text(topic),
                other_topic: publisher.topic.as_ref().is_some_and(|t| t.as_bytes() != &topic[..]),
            });
        }
    }
}

fn begins(tokens: &[u64], with: &[u32]) -> bool {
    !with.is_empty()
        && with.len() <= tokens.len()
        && with.iter().zip(tokens).all(|(a, b)| u64::from(*a) == *b)
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn judge(found: &Found, answered: Instant, rank: u32, block: u32, report: &mut Report) {
    if found.other_topic {
        report.problem(
            "trial",
            format!(
                "rank {rank}: its events carry the topic {:?}, which is not the one it says",
                found.topic
            ),
            format!("--worker URL,topic={}", found.topic),
        );
    }
    if found.block_size != block {
        report.problem(
            "trial",
            format!("rank {rank}: its events have blocks of {} tokens, not {block}", found.block_size),
            format!("--worker URL,block-size={}", found.block_size),
        );
    }
    let late = found.heard.saturating_duration_since(answered);
    if late > LATE {
        report.hint(
            "trial",
            format!("rank {rank}: the prompt was published {} ms after its answer", late.as_millis()),
            "",
        );
    } else {
        report.fine(
            "trial",
            format!("rank {rank}: a new prompt was published within {} ms of its answer", late.as_millis()),
        );
    }
    let apart_s = found.heard_unix_s - found.published_s;
    if apart_s.abs() > CLOCK_APART_S {
        report.hint(
            "clock",
            format!("rank {rank}: the engine's clock and this machine's are {apart_s:.1} s apart; lag figures will be wrong"),
            "synchronise both machines' clocks (NTP)",
        );
    }
}

fn cached(response: &Value, whole: u64, rank: u32, engine: EngineKind, report: &mut Report) {
    let cached = response.pointer("/usage/prompt_tokens_details/cached_tokens").and_then(Value::as_u64);
    match cached {
        None => report.hint(
            "cached tokens",
            format!("rank {rank}: responses do not report cached_tokens, so nothing can be audited"),
            cached_tokens_flag(engine),
        ),
        Some(n) if n == whole => report.fine(
            "cached tokens",
            format!("rank {rank}: of the same prompt again, {n} tokens came from the cache, as its events say"),
        ),
        Some(n) => report.hint(
            "cached tokens",
            format!("rank {rank}: of the same prompt again, {n} tokens came from the cache, not the {whole} that were published"),
            "",
        ),
    }
}
