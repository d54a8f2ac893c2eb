//! `POST /v1/overlap`: all that is known of who holds a prompt, and how far to believe it.

use super::App;
use super::body::{ApiError, Input};
use super::reference::{Hash, key, partition};
use crate::fleet::Trust;
use crate::indexer::Knowledge;
use crate::indexer::partition::Partition;
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use kvlane_index::hash::Scheme;
use kvlane_index::{BlockHash, Group, GroupKind, Overlap, Worker};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    model_name: String,
    routing_group: Option<String>,
    token_ids: Option<Vec<u32>>,
    block_hashes: Option<Vec<Hash>>,
    scheme: Option<String>,
    lora_name: Option<String>,
    cache_salt: Option<String>,
}

/// Blocks, and the tokens in them.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Held {
    blocks: u32,
    tokens: u32,
}

pub(super) fn held(blocks: u32, block_size_tokens: u32) -> Held {
    Held { blocks, tokens: blocks.saturating_mul(block_size_tokens) }
}

/// A KV-cache group that the rank has shown, with what a hit needs of it.
#[derive(Serialize)]
struct Rule {
    group: u16,
    rule: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    window_tokens: Option<u32>,
}

#[derive(Serialize)]
struct Rank {
    instance_id: u64,
    dp_rank: u32,
    /// From the root, confirmed.
    device: Held,
    /// From the root, confirmed or predicted.
    predicted: Held,
    /// Continuing the device run, each tier from the end of the one before.
    host: Held,
    disk: Held,
    external: Held,
    /// From the root when the tiers may alternate block by block.
    mixed: Held,
    groups: Vec<Rule>,
    trust: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trust_reason: Option<String>,
    /// How many times everything known of the rank was voided.
    epoch: u64,
    /// From the engine's publishing of the batch applied last to its being in the index, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_s: Option<f64>,
}

#[derive(Serialize)]
struct Answer {
    model_name: String,
    routing_group: String,
    block_size: u32,
    scheme: &'static str,
    knowledge: &'static str,
    /// Whole blocks of the prompt.
    blocks: usize,
    /// Blocks and events that were heard and wait to be applied.
    waiting: u64,
    ranks: Vec<Rank>,
}

/// The blocks of a prompt that was given in one of two ways.
pub(super) fn blocks(
    partition: &Partition,
    tokens: Option<&[u32]>,
    hashes: Option<&[Hash]>,
    scheme: Option<&str>,
    adapter: Option<&str>,
    salt: Option<&str>,
) -> Result<Vec<BlockHash>, ApiError> {
    match (tokens, hashes) {
        (Some(tokens), None) => Ok(partition.hash(tokens, adapter, salt)),
        (None, Some(hashes)) => {
            if adapter.is_some() || salt.is_some() {
                return Err(ApiError::bad(
                    "lora_name and cache_salt go with token_ids: block_hashes contain them already",
                ));
            }
            let known = || Scheme::ALL.map(Scheme::name).join(" or ");
            let own = partition.scheme.name();
            match scheme {
                None => Err(ApiError::bad(format!(
                    "scheme is missing: say whose rules block_hashes follow, {}",
                    known()
                ))),
                Some(scheme) if scheme == own => Ok(hashes.iter().map(|hash| hash.0).collect()),
                Some(scheme) if Scheme::ALL.iter().any(|s| s.name() == scheme) => {
                    Err(ApiError::conflict(format!(
                        "blocks are hashed by the scheme {own} here (--hash-scheme): hash by it, or send token_ids"
                    )))
                }
                Some(_) => Err(ApiError::bad(format!("scheme is not {}", known()))),
            }
        }
        _ => Err(ApiError::bad("give either token_ids or block_hashes")),
    }
}

pub(super) async fn overlap(
    State(app): State<Arc<App>>,
    Input(asked): Input<Ask>,
) -> Result<impl IntoResponse, ApiError> {
    let Ask { model_name, routing_group, token_ids, block_hashes, scheme, lora_name, cache_salt } = asked;
    let partition = partition(&app, &key(model_name, routing_group)?)?;
    let blocks = blocks(
        &partition,
        token_ids.as_deref(),
        block_hashes.as_deref(),
        scheme.as_deref(),
        lora_name.as_deref(),
        cache_salt.as_deref(),
    )?;
    Ok(Json(answer(&partition, app.registry.knowledge, &blocks)))
}

fn answer(partition: &Partition, knowledge: Knowledge, blocks: &[BlockHash]) -> Answer {
    let overlaps = partition.overlaps(blocks);
    let rules = partition.rules();
    let none = |worker| Overlap { worker, device: 0, predicted: 0, host: 0, disk: 0, external: 0, mixed: 0 };
    let held = |blocks: u32| held(blocks, partition.block_size.tokens());
    let rank = |overlap: &Overlap, trust: Trust, epoch: u64, lag_s: Option<f64>| Rank {
        instance_id: overlap.worker.instance.0,
        dp_rank: overlap.worker.rank,
        device: held(overlap.device),
        predicted: held(overlap.predicted),
        host: held(overlap.host),
        disk: held(overlap.disk),
        external: held(overlap.external),
        mixed: held(overlap.mixed),
        groups: rules.get(&overlap.worker).into_iter().flatten().map(rule).collect(),
        trust: trust.name(),
        trust_reason: trust.reason().map(str::to_owned),
        epoch,
        lag_s,
    };
    // Every rank that is followed is listed, also where it holds nothing: a scheduler must know whether it could be believed.
    let mut ranks: BTreeMap<Worker, Rank> = BTreeMap::new();
    for (worker, listener) in partition.listeners() {
        let (epoch, lag_s) = listener.counters.look(|stats| (stats.epoch, stats.lag_s));
        let overlap = overlaps.get(worker).copied().unwrap_or_else(|| none(worker));
        ranks.insert(worker, rank(&overlap, listener.trust(), epoch, lag_s));
    }
    for overlap in &overlaps.ranks {
        ranks.entry(overlap.worker).or_insert_with(|| {
            rank(overlap, Trust::Blind("only routing decisions are known".to_owned()), 0, None)
        });
    }
    Answer {
        model_name: partition.key.model.clone(),
        routing_group: partition.key.group.clone(),
        block_size: partition.block_size.tokens(),
        scheme: partition.scheme.name(),
        knowledge: match knowledge {
            Knowledge::Events => "events",
            Knowledge::Decisions => "decisions",
        },
        blocks: blocks.len(),
        waiting: partition.lane.waiting(),
        ranks: ranks.into_values().collect(),
    }
}

fn rule(group: &Group) -> Rule {
    let (rule, window_tokens) = match group.kind {
        GroupKind::Full => ("full", None),
        GroupKind::Sliding { window_tokens } => ("sliding", Some(window_tokens)),
        GroupKind::Recurrent => ("recurrent", None),
    };
    Rule { group: group.id.0, rule, window_tokens }
}
