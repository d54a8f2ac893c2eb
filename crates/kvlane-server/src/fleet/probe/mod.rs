//! From a base URL to what is behind it.
//!
//! [`alive`] is the cheap question that is asked all the time; [`probe`] learns everything, and is asked at the start, after a
//! loss, and from time to time (adapters come and go, and an engine that was restarted may be another one).
//!
//! What the engine says wins over defaults, and what the operator says wins over both.

mod http;
pub(crate) mod metrics;
mod said;

pub(crate) use self::http::{GetError, get, get_large, post};
use self::said::Said;
use crate::config::{Endpoint, EventsSetting, WorkerSpec};
use crate::fleet::{EngineKind, Facts, Publisher, Source};
use crate::ingest::zmtp::{Connection, Role, ZmtpError};
use kvlane_index::BlockSize;
use std::fmt;
use std::time::Duration;

/// Where every engine publishes unless told otherwise.
const DEFAULT_EVENTS_PORT: u16 = 5557;
/// Where every engine's documentation puts the replay socket.
const DEFAULT_REPLAY_PORT: u16 = 5558;
/// vLLM's block size on GPUs, for engines that say nothing.
const ASSUMED_BLOCK_SIZE: u32 = 16;

/// Why a probe learnt nothing. The worker is probed again in each case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeError {
    /// Nothing to talk to.
    Unreachable(String),
    /// Something answers, but it is no engine; says what it is instead and what to check.
    NotAnEngine(String),
    /// It is an engine, which does not serve now.
    NotReady(String),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(why) | Self::NotAnEngine(why) | Self::NotReady(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for ProbeError {}

/// Whether the engine still answers (`GET /health`; a server without that route is alive too).
pub(crate) async fn alive(base: &::http::Uri, limit: Duration) -> Result<(), GetError> {
    let answer = get(base, "/health", limit).await?;
    if answer.status.is_server_error() {
        return Err(GetError::Sick(format!("GET /health says {}", answer.status)));
    }
    Ok(())
}

/// Learns what the engine at `spec.base` is.
///
/// `wants_events`: look for publishers too (which may open and close connections to their ports).
pub async fn probe(spec: &WorkerSpec, wants_events: bool, limit: Duration) -> Result<Facts, ProbeError> {
    let base = &spec.base;
    let models = get(base, "/v1/models", limit).await.map_err(|error| match error {
        GetError::Http(_) => ProbeError::NotAnEngine(format!(
            "{base} is not an engine: {error}. Check the port: a worker's URL is the engine's OpenAI API, not its event port"
        )),
        _ => ProbeError::Unreachable(format!("{base}: {error}")),
    })?;
    let models = match models.status.as_u16() {
        200 => models,
        401 | 403 => {
            return Err(ProbeError::NotReady(format!(
                "{base} asks for an API key (GET /v1/models says {}): let the engine run without one behind kvlane",
                models.status
            )));
        }
        500..=599 => {
            return Err(ProbeError::NotReady(format!(
                "{base} does not serve now: GET /v1/models says {}",
                models.status
            )));
        }
        _ => {
            return Err(ProbeError::NotAnEngine(format!(
                "{base} is not an engine: GET /v1/models says {}. Check the host, port and path prefix",
                models.status
            )));
        }
    };
    let mut said = Said::models(&models.body).ok_or_else(|| {
        ProbeError::NotAnEngine(format!(
            "{base} is not an engine: its /v1/models is not OpenAI's list of models. Check the host, port and path prefix"
        ))
    })?;

    // An engine whose core has died still lists its models.
    alive(base, limit)
        .await
        .map_err(|error| ProbeError::NotReady(format!("{base} does not serve now: {error}")))?;
    // A route may be missing, but an engine that breaks off here is not to be half understood.
    let broke_off =
        |error: GetError| ProbeError::NotReady(format!("{base} answers only some questions: {error}"));
    let (version, metrics, sources) = tokio::try_join!(
        get(base, "/version", limit),
        get(base, "/metrics", limit),
        get(base, "/kv_event_sources", limit),
    )
    .map_err(broke_off)?;
    said.metrics(&String::from_utf8_lossy(&metrics.body));
    if let Some(json) = version.json() {
        said.version(&json);
    }
    if let Some(json) = sources.json() {
        said.vllm_sources(&json);
    }
    // Asked of SGLang alone: vLLM has a route of this name too, which describes the whole machine and takes seconds.
    if said.engine == EngineKind::Sglang {
        let info = match get(base, "/server_info", limit).await.map_err(broke_off)?.json() {
            Some(json) => Some(json),
            // The route's name before SGLang 0.5.
            None => get(base, "/get_server_info", limit).await.map_err(broke_off)?.json(),
        };
        if let Some(json) = info {
            said.sglang_info(&json);
        }
    }
    Ok(settle(spec, said, wants_events).await)
}

/// Joins what the engine said with what the operator said and with the defaults.
async fn settle(spec: &WorkerSpec, said: Said, wants_events: bool) -> Facts {
    let mut notes = Vec::new();
    let (block_size, block_size_source) = match (spec.block_size, said.block_size) {
        (Some(size), said) => {
            if let Some(said) = said.filter(|said| *said != size) {
                notes.push(format!(
                    "block-size={} contradicts the engine, which says {}",
                    size.tokens(),
                    said.tokens()
                ));
            }
            (size, Source::Operator)
        }
        (None, Some(size)) => (size, Source::Engine),
        (None, None) => {
            notes.push(format!(
                "the engine does not say its block size; {ASSUMED_BLOCK_SIZE} is assumed: set block-size=TOKENS"
            ));
            (BlockSize::new(ASSUMED_BLOCK_SIZE).expect("not 0"), Source::Assumed)
        }
    };
    let ranks = spec.ranks.or(said.ranks).unwrap_or(1).clamp(1, crate::config::RANKS_MAX);
    let publishers = if wants_events { publishers(spec, &said, ranks, &mut notes).await } else { Vec::new() };
    let drains = wants_events
        && publishers.is_empty()
        && said.engine == EngineKind::TensorRtLlm
        && spec.kv_events == EventsSetting::Probe;
    Facts {
        engine: said.engine,
        version: said.version,
        models: said.models,
        block_size,
        block_size_source,
        ranks,
        capacity_blocks: said.capacity_blocks,
        cached_tokens: said.cached_tokens,
        started_at_ms: said.started_at_ms,
        publishers,
        drains,
        notes,
    }
}

async fn publishers(spec: &WorkerSpec, said: &Said, ranks: u32, notes: &mut Vec<String>) -> Vec<Publisher> {
    let host = spec.host();
    let mut found = match &spec.kv_events {
        EventsSetting::Off => {
            notes.push("kv-events=none: served by predicted placements".to_owned());
            return Vec::new();
        }
        EventsSetting::At(endpoint) => {
            let replay = said.publishers.first().and_then(|p| p.replay.clone());
            by_rank(endpoint, replay.as_ref(), said.topic(), ranks, Source::Operator, notes)
        }
        EventsSetting::Probe if !said.publishers.is_empty() => said.publishers.clone(),
        EventsSetting::Probe if said.events_are_off => {
            notes.push(
                "the engine publishes no KV-cache events: start it with --kv-events-config \
                 '{\"enable_kv_cache_events\": true, \"publisher\": \"zmq\", \"endpoint\": \"tcp://*:5557\", \
                 \"replay_endpoint\": \"tcp://*:5558\"}'; until then it is served by predicted placements"
                    .to_owned(),
            );
            return Vec::new();
        }
        EventsSetting::Probe => {
            let usual = Endpoint::new(host, DEFAULT_EVENTS_PORT);
            match Connection::open(&usual, Role::Sub).await {
                Ok(_) => by_rank(&usual, None, None, ranks, Source::Assumed, notes),
                // Fetched over HTTP, then.
                Err(_) if said.engine == EngineKind::TensorRtLlm => return Vec::new(),
                Err(error) => {
                    notes.push(format!(
                        "the engine does not say where it publishes KV-cache events, and the usual {usual} does not answer \
                         ({error}): set kv-events=tcp://HOST:PORT; until then it is served by predicted placements"
                    ));
                    return Vec::new();
                }
            }
        }
    };
    for publisher in &mut found {
        publisher.events = publisher.events.on(host);
        if spec.topic.is_some() {
            publisher.topic.clone_from(&spec.topic);
        }
    }
    replays(spec, &mut found, notes).await;
    found
}

fn by_rank(
    events: &Endpoint,
    replay: Option<&Endpoint>,
    topic: Option<&String>,
    ranks: u32,
    source: Source,
    notes: &mut Vec<String>,
) -> Vec<Publisher> {
    let mut found = Vec::new();
    for rank in 0..ranks {
        match events.rank(rank) {
            Ok(events) => found.push(Publisher {
                rank,
                events,
                replay: replay.and_then(|r| r.rank(rank).ok()),
                topic: topic.cloned(),
                source,
            }),
            Err(error) => {
                notes.push(format!("no events from rank {rank}: {error}"));
                break;
            }
        }
    }
    found
}

/// Fills in where each publisher replays.
async fn replays(spec: &WorkerSpec, found: &mut [Publisher], notes: &mut Vec<String>) {
    match &spec.replay {
        EventsSetting::Off => found.iter_mut().for_each(|p| p.replay = None),
        EventsSetting::At(endpoint) => {
            for publisher in found {
                publisher.replay = endpoint.rank(publisher.rank).ok().map(|e| e.on(spec.host()));
            }
        }
        EventsSetting::Probe => {
            for publisher in found.iter_mut() {
                publisher.replay = publisher.replay.as_ref().map(|e| e.on(spec.host()));
            }
            let said_nothing = !found.is_empty() && found.iter().all(|p| p.replay.is_none());
            if !said_nothing {
                return;
            }
            let usual = Endpoint::new(&found[0].events.host, DEFAULT_REPLAY_PORT);
            // Only where events are on their usual port too: beside another one, the usual replay port is some other engine's.
            let may_guess = found[0].source == Source::Assumed || found[0].events.port == DEFAULT_EVENTS_PORT;
            let answer = if may_guess {
                Connection::open(&usual, Role::Dealer).await
            } else {
                Err(ZmtpError::Peer("its events are not on the usual port either".to_owned()))
            };
            match answer {
                Ok(_) => {
                    for publisher in found {
                        publisher.replay = usual.rank(publisher.rank).ok();
                    }
                }
                Err(_) => notes.push(
                    "the engine has no replay socket, so a lost event cannot be asked for again: start it with \
                     \"replay_endpoint\": \"tcp://*:5558\" in --kv-events-config, or set replay=tcp://HOST:PORT"
                        .to_owned(),
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests;
