//! `POST /v1/decisions`: where a prompt was sent, as knowledge for engines that publish no events.
//!
//! A decision is worth something for a while ([`TTL_MS`] unless said otherwise) and then forgotten. One writer records for a partition: two
//! routers that each saw half of the decisions would each be answered from all of them, at different times, by whichever process they reach.
//! A writer's right ends when the last of its decisions has expired.

use super::App;
use super::body::{ApiError, Input};
use super::overlap::blocks;
use super::reference::{Hash, key, name};
use crate::clock;
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use kvlane_index::{BlockSize, Worker};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

/// How long a decision counts, in milliseconds.
const TTL_MS: u64 = 120_000;
/// The longest that may be asked for: a day.
const TTL_MS_MAX: u64 = 86_400_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Decision {
    writer: String,
    model_name: String,
    routing_group: Option<String>,
    instance_id: u64,
    #[serde(default)]
    dp_rank: u32,
    block_size: Option<u32>,
    token_ids: Option<Vec<u32>>,
    block_hashes: Option<Vec<Hash>>,
    scheme: Option<String>,
    lora_name: Option<String>,
    cache_salt: Option<String>,
    ttl_ms: Option<u64>,
}

pub(super) async fn record(
    State(app): State<Arc<App>>,
    Input(decision): Input<Decision>,
) -> Result<impl IntoResponse, ApiError> {
    if !app.is_told() {
        return Err(ApiError::conflict(
            "this indexer hears engines and takes no routing decisions: record at one that was started with --decisions",
        ));
    }
    let key = key(decision.model_name, decision.routing_group)?;
    let writer = name(decision.writer, "writer")?;
    if writer.is_empty() {
        return Err(ApiError::bad("writer is empty: name the one router that records for this partition"));
    }
    let ttl_ms = decision.ttl_ms.unwrap_or(TTL_MS);
    if !(1..=TTL_MS_MAX).contains(&ttl_ms) {
        return Err(ApiError::bad(format!("ttl_ms is not from 1 to {TTL_MS_MAX}")));
    }
    let block_size = match decision.block_size {
        Some(tokens) => Some(
            BlockSize::new(tokens)
                .ok_or_else(|| ApiError::bad("block_size is 0: give the tokens in a block"))?,
        ),
        None => app.registry.partition(&key).map(|p| p.block_size).or(app.config.decisions_block_size),
    };
    let block_size = block_size.ok_or_else(|| {
        ApiError::bad("block_size is missing: the first decision of a partition says it (or --block-size)")
    })?;
    let partition =
        app.registry.open(&key, block_size).map_err(|error| ApiError::conflict(error.to_string()))?;
    let blocks = blocks(
        &partition,
        decision.token_ids.as_deref(),
        decision.block_hashes.as_deref(),
        decision.scheme.as_deref(),
        decision.lora_name.as_deref(),
        decision.cache_salt.as_deref(),
    )?;
    let until_ms = clock::now_ms() + ttl_ms;
    partition.claim(&writer, until_ms).map_err(|other| {
        ApiError::conflict(format!(
            "this partition's decisions are recorded by {:?}: one writer only; its right ends {} ms after its last decision at the latest",
            other.name,
            other.until_ms.saturating_sub(clock::now_ms()),
        ))
    })?;
    partition.index.predict(Worker::new(decision.instance_id, decision.dp_rank), &blocks, until_ms);
    Ok(Json(json!({ "status": "ok", "blocks": blocks.len(), "block_size": block_size.tokens() })))
}
