//! Examines one engine: everything that would make routing by its cache blind, slow or wrong, and the flag that mends it.
//!
//! Asks what the fleet's probe asks, then tries the promises: listens to the event and replay sockets, sends a prompt of random
//! tokens twice to each rank, and compares what is published and reported with what was sent. It is the one part of the program
//! that sends an engine requests of its own (two for each rank, one token of output each), and only when called for.

mod trial;

use crate::config::{EventsSetting, WorkerSpec};
use crate::fleet::probe::{self, get, metrics::samples, post};
use crate::fleet::{CachedTokens, EngineKind, Facts, Source};
use crate::ingest::{Tap, Tapped};
use http::StatusCode;
use kvlane_events::wire::drain::decode_drain;
use std::time::Duration;

/// Time for each question.
const LIMIT: Duration = Duration::from_secs(10);
/// Batches kept for replay below which a router that was away for a while finds a hole.
const BUFFER_STEPS_FEW: u64 = 1_000;

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// As it should be.
    Fine,
    /// Works, but something is lost or uncertain.
    Hint,
    /// Routing by the cache does not work, or is wrong.
    Problem,
}

impl Severity {
    /// The word printed in front.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Hint => "hint",
            Self::Problem => "problem",
        }
    }
}

/// One thing found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What it is about, one or two words.
    pub about: &'static str,
    /// What was found.
    pub text: String,
    /// The exact flag or setting that mends it, where there is one.
    pub fix: Option<String>,
}

/// Everything found, in the order of the examination.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst finding; `Fine` if there is none.
    pub fn worst(&self) -> Severity {
        self.findings.iter().map(|f| f.severity).max().unwrap_or(Severity::Fine)
    }

    fn fine(&mut self, about: &'static str, text: String) {
        self.findings.push(Finding { severity: Severity::Fine, about, text, fix: None });
    }

    fn hint(&mut self, about: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        let fix = Some(fix.into()).filter(|f| !f.is_empty());
        self.findings.push(Finding { severity: Severity::Hint, about, text: text.into(), fix });
    }

    fn problem(&mut self, about: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        let fix = Some(fix.into()).filter(|f| !f.is_empty());
        self.findings.push(Finding { severity: Severity::Problem, about, text: text.into(), fix });
    }
}

/// Examines the engine at `spec.base`; takes some seconds. `with_requests`: send it requests too.
pub async fn examine(spec: &WorkerSpec, with_requests: bool) -> Report {
    let mut report = Report::default();
    let facts = match probe::probe(spec, true, LIMIT).await {
        Ok(facts) => facts,
        Err(error) => {
            report.problem("engine", error.to_string(), "");
            return report;
        }
    };
    engine(&facts, &mut report);
    prefix_caching(spec, &facts, &mut report).await;
    if facts.drains {
        drain(spec, &facts, with_requests, &mut report).await;
    } else {
        sockets(spec, &facts, &mut report).await;
    }
    if with_requests {
        trial::run(spec, &facts, &mut report).await;
    } else if facts.cached_tokens == CachedTokens::NotReported {
        report.hint(
            "cached tokens",
            "responses do not report cached_tokens",
            cached_tokens_flag(facts.engine),
        );
    }
    report
}

fn engine(facts: &Facts, report: &mut Report) {
    let version = facts.version.as_deref().unwrap_or("of an unknown version");
    let name = facts.engine.name();
    match (facts.engine, facts.version.as_deref().and_then(minor)) {
        (EngineKind::Other, _) => report.hint(
            "engine",
            "speaks OpenAI's API, but is none of vLLM, SGLang and TensorRT-LLM; its events are read as vLLM's",
            "",
        ),
        (EngineKind::Vllm, Some(version_of)) if !((0, 9)..=(0, 32)).contains(&version_of) => report.hint(
            "engine",
            format!("{name} {version} is outside the tested range, 0.9 to 0.32"),
            "",
        ),
        _ => report.fine("engine", format!("{name} {version}")),
    }
    let adapters = facts.models.iter().filter(|m| m.parent.is_some()).count();
    let length = facts.models.first().and_then(|m| m.max_model_len);
    let length = length.map_or_else(|| "unknown length".to_owned(), |n| format!("up to {n} tokens"));
    report.fine(
        "model",
        format!("{} ({length}), {adapters} adapters, {} ranks", facts.base_model(), facts.ranks),
    );
    let tokens = facts.block_size.tokens();
    match (facts.block_size_source, tokens) {
        (Source::Assumed, _) => report.problem(
            "block size",
            format!("the engine does not say it; {tokens} is assumed"),
            "--worker URL,block-size=TOKENS",
        ),
        (_, 1..=7) => report.hint(
            "block size",
            format!(
                "{tokens} tokens a block: every block is an event, which costs the engine and the router much"
            ),
            if facts.engine == EngineKind::Sglang { "--page-size 16" } else { "--block-size 16" },
        ),
        _ => {
            let pool =
                facts.capacity_blocks.map_or_else(String::new, |n| format!(", {n} blocks in each rank"));
            report.fine("block size", format!("{tokens} tokens{pool}"));
        }
    }
    match facts.started_at_ms {
        Some(_) => report.fine("restarts", "its process start time tells a restart".to_owned()),
        None => report.hint(
            "restarts",
            "/metrics has no process_start_time_seconds: a restart is told from its events alone",
            "",
        ),
    }
}

/// Major and minor number.
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

async fn prefix_caching(spec: &WorkerSpec, facts: &Facts, report: &mut Report) {
    if facts.engine != EngineKind::Vllm {
        return;
    }
    let Ok(answer) = get(&spec.base, "/metrics", LIMIT).await else { return };
    let text = String::from_utf8_lossy(&answer.body);
    let Some(info) = samples(&text).find(|s| s.name == "vllm:cache_config_info") else {
        return report.hint(
            "prefix cache",
            "/metrics does not say whether the prefix cache is on",
            "do not start it with --disable-log-stats",
        );
    };
    match info.label("enable_prefix_caching") {
        Some("False") => report.problem("prefix cache", "is switched off", "--enable-prefix-caching"),
        _ => {
            let hash = info.label("prefix_caching_hash_algo").unwrap_or("unsaid");
            report.fine("prefix cache", format!("on, hashed with {hash} (kvlane hashes tokens itself)"));
        }
    }
}

fn events_flag(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::TensorRtLlm => {
            "kv_cache_config: {enable_block_reuse: true, event_buffer_max_size: 100000} in the file of --extra_llm_api_options"
        }
        EngineKind::Sglang => {
            "--kv-events-config '{\"publisher\": \"zmq\", \"endpoint\": \"tcp://*:5557\", \"topic\": \"kv-events\", \
             \"replay_endpoint\": \"tcp://*:5657\"}'"
        }
        _ => {
            "--kv-events-config '{\"enable_kv_cache_events\": true, \"publisher\": \"zmq\", \"endpoint\": \"tcp://*:5557\", \
             \"replay_endpoint\": \"tcp://*:5657\"}'"
        }
    }
}

fn cached_tokens_flag(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Sglang => "--enable-cache-report",
        _ => "--enable-prompt-tokens-details",
    }
}

/// TensorRT-LLM's buffered events. To ask is to take them away from a router that follows the engine (which then finds a gap, and heals).
async fn drain(spec: &WorkerSpec, facts: &Facts, with_requests: bool, report: &mut Report) {
    if !with_requests {
        return report.hint(
            "events",
            "are fetched over HTTP, which was not tried: who asks takes them away",
            "",
        );
    }
    let answer = post(&spec.base, "/kv_cache_events", &serde_json::json!({}), 0, LIMIT).await;
    match answer.map(|answer| (answer.status, decode_drain(&answer.body, facts.block_size.tokens()))) {
        Ok((StatusCode::OK, Ok(events))) => {
            let unusable = events.iter().filter(|e| e.as_ref().map_or(true, |e| e.data.is_err())).count();
            let text =
                format!("fetched over HTTP: {} waited, {unusable} of them not understood", events.len());
            if unusable > 0 { report.hint("events", text, "") } else { report.fine("events", text) }
        }
        Ok((StatusCode::OK, Err(reason))) => {
            let text = format!("POST /kv_cache_events answers what is no list of events ({})", reason.name());
            report.problem("events", text, events_flag(facts.engine));
        }
        Ok((status, _)) => {
            report.problem(
                "events",
                format!("POST /kv_cache_events says {status}"),
                events_flag(facts.engine),
            );
        }
        Err(error) => {
            report.problem("events", format!("POST /kv_cache_events: {error}"), events_flag(facts.engine));
        }
    }
}

async fn sockets(spec: &WorkerSpec, facts: &Facts, report: &mut Report) {
    if facts.publishers.is_empty() {
        let why = facts.notes.last().cloned().unwrap_or_default();
        if spec.kv_events == EventsSetting::Off {
            report.hint("events", why, "");
        } else {
            report.problem("events", why, events_flag(facts.engine));
        }
        return;
    }
    for publisher in &facts.publishers {
        let rank = publisher.rank;
        let mut tap = Tap::subscribe(&publisher.events, publisher.topic.as_deref().unwrap_or_default());
        match tokio::time::timeout(LIMIT, tap.recv()).await {
            Ok(Some(Tapped::Connected)) => {
                let topic = publisher.topic.as_deref().unwrap_or("(any)");
                report.fine("events", format!("rank {rank}: {} answers, topic {topic}", publisher.events));
            }
            Ok(Some(Tapped::Lost(why))) => report.problem(
                "events",
                format!("rank {rank}: no connection to {}: {why}", publisher.events),
                "open the port to this machine, or name it: --worker URL,kv-events=tcp://HOST:PORT",
            ),
            Ok(_) | Err(_) => {
                report.problem("events", format!("rank {rank}: {} is silent", publisher.events), "");
            }
        }
        match &publisher.replay {
            None => report.hint(
                "replay",
                format!("rank {rank}: no replay socket, so what was published before, and what is lost, stays unknown"),
                "\"replay_endpoint\": \"tcp://*:5657\" in --kv-events-config",
            ),
            Some(endpoint) => replay(rank, endpoint, report).await,
        }
    }
}

async fn replay(rank: u32, endpoint: &crate::config::Endpoint, report: &mut Report) {
    let mut tap = Tap::replay(endpoint, 0);
    let (mut batches, mut first, mut ended) = (0u64, None, false);
    let reading = async {
        while let Some(Tapped::Message(frames)) = tap.recv().await {
            let [.., seq, payload] = &frames[..] else { continue };
            if payload.is_empty() {
                ended = true;
                break;
            }
            let seq = <[u8; 8]>::try_from(&seq[..]).map(u64::from_be_bytes).ok();
            first = first.or(seq);
            batches += 1;
        }
    };
    let _ = tokio::time::timeout(LIMIT, reading).await;
    match (ended, first) {
        (false, _) => report.problem(
            "replay",
            format!("rank {rank}: {endpoint} gives no complete answer ({batches} batches came)"),
            "open the port to this machine, or name it: --worker URL,replay=tcp://HOST:PORT",
        ),
        (true, None) => report.fine("replay", format!("rank {rank}: {endpoint} answers, nothing published yet")),
        (true, Some(0)) => {
            report.fine("replay", format!("rank {rank}: {endpoint} has all {batches} batches of this life"));
        }
        (true, Some(_)) if batches < BUFFER_STEPS_FEW => report.hint(
            "replay",
            format!("rank {rank}: {endpoint} keeps only {batches} batches: a router started now misses the older ones"),
            "\"buffer_steps\": 100000 in --kv-events-config",
        ),
        (true, Some(first)) => report.hint(
            "replay",
            format!(
                "rank {rank}: {endpoint} keeps the last {batches} batches (from number {first}): a router started now misses the \
                 older ones"
            ),
            "a larger \"buffer_steps\" in --kv-events-config",
        ),
    }
}
