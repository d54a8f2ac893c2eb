//! The reference's calls, kept alike: paths, JSON, statuses, texts of errors, and counts in *tokens*.
//!
//! Different on purpose, each because the oracle says so: overlaps after evictions (a tail that lost its middle counts again once the middle is
//! back), tiers that continue predictions never; and a listener that loses its connection is `failed` until it is back.

use super::App;
use super::body::{ApiError, Input};
use crate::config::Endpoint;
use crate::config::PeerError;
use crate::indexer::listener::Listener;
use crate::indexer::partition::{Key, Partition};
use crate::indexer::registry::{NAME_BYTES_MAX, RegistryError};
use crate::indexer::{Registration, registry};
use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use kvlane_index::{BlockHash, BlockSize, Overlap};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What most calls answer when they worked.
fn ok() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// A registry error under the status that the reference gives to its kind of call.
fn refused(error: &RegistryError, status: StatusCode) -> ApiError {
    let status = match error {
        RegistryError::WrongState(..) => StatusCode::CONFLICT,
        _ => status,
    };
    ApiError::new(status, error.to_string())
}

pub(super) fn name(text: String, what: &str) -> Result<String, ApiError> {
    if text.len() > registry::NAME_BYTES_MAX {
        return Err(ApiError::bad(format!("{what} is longer than {NAME_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// The partition's name out of a call.
pub(super) fn key(model: String, group: Option<String>) -> Result<Key, ApiError> {
    Ok(Key {
        model: name(model, "model_name")?,
        group: name(group.unwrap_or_else(|| Key::DEFAULT_GROUP.to_owned()), "routing_group")?,
    })
}

/// The partition that a question is for.
pub(super) fn partition(app: &App, key: &Key) -> Result<Arc<Partition>, ApiError> {
    app.registry.partition(key).ok_or_else(|| {
        ApiError::not_found(format!("no indexer for model={} routing_group={}", key.model, key.group))
    })
}

#[derive(Deserialize)]
pub(super) struct Register {
    instance_id: u64,
    endpoint: String,
    model_name: String,
    routing_group: Option<String>,
    block_size: u32,
    dp_rank: Option<u32>,
    replay_endpoint: Option<String>,
}

pub(super) async fn register(
    State(app): State<Arc<App>>,
    Input(asked): Input<Register>,
) -> Result<impl IntoResponse, ApiError> {
    let Key { model, group } = key(asked.model_name, asked.routing_group)?;
    let endpoint =
        endpoint(&asked.endpoint).map_err(|why| ApiError::bad(format!("invalid endpoint: {why}")))?;
    let replay = asked.replay_endpoint.as_deref().map(self::endpoint).transpose();
    let replay = replay.map_err(|why| ApiError::bad(format!("invalid replay endpoint: {why}")))?;
    let block_size = BlockSize::new(asked.block_size)
        .ok_or_else(|| ApiError::bad("block_size is 0: give the tokens in a block"))?;
    let registration = Registration {
        instance: asked.instance_id,
        rank: asked.dp_rank.unwrap_or(0),
        endpoint,
        replay,
        model,
        group,
        block_size,
    };
    let registered = app.registry.register(&registration).await;
    registered.map_err(|error| refused(&error, StatusCode::CONFLICT))?;
    Ok((StatusCode::CREATED, ok()))
}

/// A TCP endpoint that can be connected to; the text of an error is for the client.
pub(in crate::indexer) fn endpoint(text: &str) -> Result<Endpoint, String> {
    let endpoint: Endpoint = text.parse().map_err(|error: crate::config::EndpointError| error.to_string())?;
    if endpoint.port == 0 || endpoint.is_wildcard() {
        return Err("it names no host and port that can be connected to: write tcp://HOST:PORT".to_owned());
    }
    Ok(endpoint)
}

#[derive(Deserialize)]
pub(super) struct Unregister {
    instance_id: u64,
    model_name: String,
    routing_group: Option<String>,
    dp_rank: Option<u32>,
}

pub(super) async fn unregister(
    State(app): State<Arc<App>>,
    Input(asked): Input<Unregister>,
) -> Result<impl IntoResponse, ApiError> {
    let Unregister { instance_id, model_name, routing_group, dp_rank } = asked;
    // As there: a rank counts only where a routing group is named too.
    let rank = dp_rank.filter(|_| routing_group.is_some());
    let gone = app.registry.unregister(instance_id, &model_name, routing_group.as_deref(), rank).await;
    let gone = gone.map_err(|error| refused(&error, StatusCode::NOT_FOUND))?;
    gone.into_iter().for_each(|worker| app.selector.forget(worker));
    Ok(ok())
}

#[derive(Deserialize)]
pub(super) struct Which {
    model_name: Option<String>,
    routing_group: Option<String>,
}

#[derive(Serialize)]
struct ListenerInfo {
    endpoint: String,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
}

#[derive(Serialize)]
struct WorkerInfo {
    instance_id: u64,
    source: &'static str,
    status: &'static str,
    model_name: String,
    routing_group: String,
    block_size: u32,
    endpoints: BTreeMap<u32, String>,
    listeners: BTreeMap<u32, ListenerInfo>,
}

pub(super) async fn workers(State(app): State<Arc<App>>, Query(which): Query<Which>) -> impl IntoResponse {
    let mut list = Vec::new();
    for partition in app.registry.partitions() {
        let Key { model, group } = &partition.key;
        if which.model_name.as_ref().is_some_and(|m| m != model)
            || which.routing_group.as_ref().is_some_and(|g| g != group)
        {
            continue;
        }
        let instances = partition.instances();
        for (instance, ranks) in instances.iter() {
            let listeners: BTreeMap<u32, ListenerInfo> =
                ranks.iter().map(|(rank, l)| (*rank, info(l))).collect();
            list.push(WorkerInfo {
                instance_id: *instance,
                source: "zmq",
                status: overall(ranks),
                model_name: model.clone(),
                routing_group: group.clone(),
                block_size: partition.block_size.tokens(),
                endpoints: listeners.iter().map(|(rank, l)| (*rank, l.endpoint.clone())).collect(),
                listeners,
            });
        }
    }
    Json(list)
}

fn info(listener: &Listener) -> ListenerInfo {
    ListenerInfo {
        endpoint: listener.endpoint.to_string(),
        status: listener.status().name(),
        last_error: listener.last_error(),
    }
}

/// An instance is as its worst rank.
fn overall(ranks: &BTreeMap<u32, Arc<Listener>>) -> &'static str {
    use crate::indexer::listener::Status;
    let statuses: Vec<Status> = ranks.values().map(|l| l.status()).collect();
    let worst = [Status::Failed, Status::Pending, Status::Paused].into_iter().find(|s| statuses.contains(s));
    worst.unwrap_or(Status::Active).name()
}

#[derive(Deserialize)]
pub(super) struct ByTokens {
    token_ids: Vec<u32>,
    model_name: String,
    routing_group: Option<String>,
    lora_name: Option<String>,
    cache_salt: Option<String>,
}

pub(super) async fn query(
    State(app): State<Arc<App>>,
    Input(asked): Input<ByTokens>,
) -> Result<impl IntoResponse, ApiError> {
    let partition = partition(&app, &key(asked.model_name, asked.routing_group)?)?;
    let hashes = partition.hash(&asked.token_ids, asked.lora_name.as_deref(), asked.cache_salt.as_deref());
    Ok(Json(scores(&app, &partition, &hashes)))
}

#[derive(Deserialize)]
pub(super) struct ByHash {
    block_hashes: Vec<Hash>,
    model_name: String,
    routing_group: Option<String>,
    cache_salt: Option<Value>,
}

pub(super) async fn query_by_hash(
    State(app): State<Arc<App>>,
    Input(asked): Input<ByHash>,
) -> Result<impl IntoResponse, ApiError> {
    if asked.cache_salt.is_some() {
        return Err(ApiError::bad(
            "cache_salt is not accepted by /query_by_hash: the hashes must contain it already",
        ));
    }
    let partition = partition(&app, &key(asked.model_name, asked.routing_group)?)?;
    let hashes: Vec<BlockHash> = asked.block_hashes.iter().map(|h| h.0).collect();
    Ok(Json(scores(&app, &partition, &hashes)))
}

/// A block hash in JSON: 64 bits, signed (as the reference's clients send it) or not.
#[derive(Clone, Copy)]
pub(super) struct Hash(pub(super) BlockHash);

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = u64;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a 64-bit integer")
            }
            fn visit_u64<E>(self, value: u64) -> Result<u64, E> {
                Ok(value)
            }
            fn visit_i64<E>(self, value: i64) -> Result<u64, E> {
                Ok(value.cast_unsigned())
            }
        }
        deserializer.deserialize_any(Visitor).map(|hash| Self(BlockHash(hash)))
    }
}

/// The answer of both queries, in tokens.
#[derive(Serialize)]
struct Scores {
    scores: BTreeMap<u64, BTreeMap<u32, u32>>,
    frequencies: [u32; 0],
    instances: BTreeMap<u64, Summary>,
}

/// `cpu` and `disk` contain the tiers before them; each is the best of the instance's ranks.
#[derive(Default, Serialize)]
struct Summary {
    longest_matched: u32,
    gpu: u32,
    dp: BTreeMap<u32, u32>,
    cpu: u32,
    disk: u32,
}

fn scores(app: &App, partition: &Partition, hashes: &[BlockHash]) -> Scores {
    let tokens = |blocks: u32| blocks.saturating_mul(partition.block_size.tokens());
    // Where decisions are all that is known, they are the answer; where engines speak, predictions are none of theirs.
    let device = |overlap: &Overlap| if app.is_told() { overlap.predicted } else { overlap.device };
    let mut out = Scores { scores: BTreeMap::new(), frequencies: [], instances: BTreeMap::new() };
    for overlap in &partition.overlaps(hashes).ranks {
        let (instance, rank) = (overlap.worker.instance.0, overlap.worker.rank);
        let gpu = device(overlap);
        let cpu = gpu.saturating_add(overlap.host);
        let disk = cpu.saturating_add(overlap.disk).saturating_add(overlap.external);
        if disk == 0 {
            continue;
        }
        if gpu > 0 {
            out.scores.entry(instance).or_default().insert(rank, tokens(gpu));
        }
        let summary = out.instances.entry(instance).or_default();
        summary.dp.insert(rank, tokens(gpu));
        summary.gpu = summary.gpu.max(tokens(gpu));
        summary.cpu = summary.cpu.max(tokens(cpu));
        summary.disk = summary.disk.max(tokens(disk));
        summary.longest_matched = summary.gpu.max(summary.cpu).max(summary.disk);
    }
    out
}

#[derive(Deserialize)]
pub(super) struct Peer {
    url: String,
}

pub(super) async fn register_peer(
    State(app): State<Arc<App>>,
    Input(asked): Input<Peer>,
) -> Result<impl IntoResponse, ApiError> {
    if app.is_told() {
        return Err(ApiError::conflict("an indexer of routing decisions has one writer and no replicas"));
    }
    app.registry.peers.add(&asked.url).map_err(|error| match error {
        PeerError::NotAUrl => ApiError::bad("url is not a peer's base URL: write http://HOST:PORT"),
        PeerError::TooMany => ApiError::conflict("there are too many peers: deregister some first"),
    })?;
    Ok((StatusCode::CREATED, ok()))
}

pub(super) async fn deregister_peer(
    State(app): State<Arc<App>>,
    Input(asked): Input<Peer>,
) -> Result<impl IntoResponse, ApiError> {
    if app.registry.peers.remove(&asked.url) { Ok(ok()) } else { Err(ApiError::not_found("peer not found")) }
}

pub(super) async fn peers(State(app): State<Arc<App>>) -> impl IntoResponse {
    Json(app.registry.peers.all())
}

pub(super) async fn health() -> StatusCode {
    StatusCode::OK
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
        app.metrics.text(&app.registry),
    )
}

/// There is no log file of its own to open again: logs go to stderr.
pub(super) async fn reopen_logs() -> impl IntoResponse {
    ok()
}

#[derive(Deserialize)]
pub(super) struct WhichListener {
    instance_id: u64,
    dp_rank: Option<u32>,
}

pub(super) async fn pause(
    State(app): State<Arc<App>>,
    Input(asked): Input<WhichListener>,
) -> Result<impl IntoResponse, ApiError> {
    let paused = app.registry.pause(asked.instance_id, asked.dp_rank.unwrap_or(0)).await;
    paused.map_err(|error| refused(&error, StatusCode::NOT_FOUND))?;
    Ok(ok())
}

pub(super) async fn resume(
    State(app): State<Arc<App>>,
    Input(asked): Input<WhichListener>,
) -> Result<impl IntoResponse, ApiError> {
    let resumed = app.registry.resume(asked.instance_id, asked.dp_rank.unwrap_or(0)).await;
    resumed.map_err(|error| refused(&error, StatusCode::NOT_FOUND))?;
    Ok(ok())
}
