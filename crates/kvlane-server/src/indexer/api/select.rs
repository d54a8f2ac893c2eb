//! `/v1/select`, `/v1/reservations`, `/v1/loads`: the scheduler for callers that proxy by themselves.

use super::App;
use super::body::{ApiError, Input};
use super::overlap::{Held, blocks, held};
use super::reference::{Hash, key, name, partition};
use crate::clock;
use crate::gateway::{believed, ledger_ids};
use crate::indexer::Knowledge;
use crate::indexer::partition::Partition;
use crate::select::{Ask, Booked, NotBooked, Offer, RESERVATIONS_MAX};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use kvlane_index::{BlockHash, InstanceId, Overlaps, Worker};
use kvlane_sched::{Decision, FilterReason, Load, Pin, Reject, Row};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64;

/// A lease where none is asked for, in milliseconds.
const LEASE_MS: u64 = 60_000;
/// The longest: an hour.
const LEASE_MS_MAX: u64 = 3_600_000;
/// Most workers that a call may name.
const WORKERS_MAX: usize = 4_096;
/// Rows of an explanation; a larger fleet's is cut after the cheapest.
const ROWS_MAX: usize = 64;
/// A booked prompt's blocks are predicted to be there for so long; events confirm or replace them before.
const PREDICTED: Duration = Duration::from_secs(5);

/// A worker as a caller names it; without a rank: any of the instance.
#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    instance_id: u64,
    dp_rank: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Select {
    model_name: String,
    routing_group: Option<String>,
    token_ids: Option<Vec<u32>>,
    block_hashes: Option<Vec<Hash>>,
    scheme: Option<String>,
    prompt_tokens: Option<u32>,
    lora_name: Option<String>,
    cache_salt: Option<String>,
    expected_output_tokens: Option<u32>,
    max_output_tokens: Option<u32>,
    session_id: Option<String>,
    pinned: Option<Named>,
    workers: Option<Vec<Named>>,
    reservation_id: Option<String>,
    lease_ms: Option<u64>,
}

#[derive(Serialize)]
struct Name {
    instance_id: u64,
    dp_rank: u32,
}

impl From<Worker> for Name {
    fn from(worker: Worker) -> Self {
        Self { instance_id: worker.instance.0, dp_rank: worker.rank }
    }
}

#[derive(Serialize)]
struct LoadJson {
    prefill_requests: u32,
    prefill_tokens: u64,
    decode_requests: u32,
    decode_tokens: u64,
}

impl From<Load> for LoadJson {
    fn from(load: Load) -> Self {
        Self {
            prefill_requests: load.prefill_requests,
            prefill_tokens: load.prefill_tokens,
            decode_requests: load.decode_requests,
            decode_tokens: load.decode_tokens,
        }
    }
}

/// Why a worker was chosen or not, in the terms of the policy.
#[derive(Serialize)]
struct Explained {
    #[serde(flatten)]
    worker: Name,
    cached_tokens: u32,
    terms: BTreeMap<&'static str, f64>,
    total: Option<f64>,
    filtered: Option<&'static str>,
    load: LoadJson,
}

#[derive(Serialize)]
struct Selected {
    #[serde(flatten)]
    worker: Name,
    /// The engine's publisher as it was registered; `null` for a worker that only the caller knows.
    endpoint: Option<String>,
    block_size: u32,
    prompt_tokens: u32,
    /// Prompt tokens that it is expected not to compute.
    cached_tokens: u32,
    device: Held,
    /// Whom to try if it cannot be reached, the choice first.
    order: Vec<Name>,
    policy: &'static str,
    unit: &'static str,
    picked_because: String,
    candidates: Vec<Explained>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reservation_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_ms: Option<u64>,
}

/// A question with everything that was looked up for it.
struct Prepared {
    partition: Arc<Partition>,
    blocks: Vec<BlockHash>,
    overlaps: Overlaps,
    ask: Ask,
}

fn prepare(app: &App, asked: &Select) -> Result<Prepared, ApiError> {
    let partition = partition(app, &key(asked.model_name.clone(), asked.routing_group.clone())?)?;
    let blocks = blocks(
        &partition,
        asked.token_ids.as_deref(),
        asked.block_hashes.as_deref(),
        asked.scheme.as_deref(),
        asked.lora_name.as_deref(),
        asked.cache_salt.as_deref(),
    )?;
    let block_size_tokens = partition.block_size.tokens();
    let whole = u32::try_from(blocks.len()).unwrap_or(u32::MAX).saturating_mul(block_size_tokens);
    let prompt_tokens = match (&asked.token_ids, asked.prompt_tokens) {
        (Some(tokens), _) => u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        (None, Some(tokens)) if tokens < whole => {
            return Err(ApiError::bad(
                "prompt_tokens is less than block_hashes span: give the prompt's length in tokens",
            ));
        }
        (None, tokens) => tokens.unwrap_or(whole),
    };
    let overlaps = partition.overlaps(&blocks);
    let mut ledger = Vec::new();
    let ledger_id_tokens = ledger_ids(&blocks, block_size_tokens, &mut ledger);
    let model = asked.lora_name.as_deref().unwrap_or(&asked.model_name);
    let ask = Ask {
        model: xxh3_64(model.as_bytes()),
        block_size_tokens,
        prompt_tokens: prompt_tokens.max(1),
        expected_output_tokens: asked.expected_output_tokens,
        max_output_tokens: asked.max_output_tokens,
        pinned: asked.pinned.map(|pinned| match pinned.dp_rank {
            Some(rank) => Pin::Worker(Worker::new(pinned.instance_id, rank)),
            None => Pin::Instance(InstanceId(pinned.instance_id)),
        }),
        session: asked.session_id.as_deref().map(|id| xxh3_64(id.as_bytes())),
        ledger_ids: ledger,
        ledger_id_tokens,
        offers: offers(app, &partition, &overlaps, asked.workers.as_deref())?,
    };
    Ok(Prepared { partition, blocks, overlaps, ask })
}

/// Who may be chosen: the ranks that are registered, or those that the caller names (which need not be).
fn offers(
    app: &App,
    partition: &Partition,
    overlaps: &Overlaps,
    named: Option<&[Named]>,
) -> Result<Vec<Offer>, ApiError> {
    let mut trusts: BTreeMap<Worker, f64> =
        partition.listeners().into_iter().map(|(worker, l)| (worker, believed(&l.trust()))).collect();
    if app.registry.knowledge == Knowledge::Decisions {
        trusts.extend(overlaps.ranks.iter().map(|overlap| (overlap.worker, 1.0)));
    }
    if let Some(named) = named {
        if named.len() > WORKERS_MAX {
            return Err(ApiError::bad(format!("workers names more than {WORKERS_MAX}")));
        }
        let known = trusts;
        trusts = BTreeMap::new();
        for Named { instance_id, dp_rank } in named {
            let first = Worker::new(*instance_id, dp_rank.unwrap_or(0));
            let last = dp_rank.unwrap_or(u32::MAX);
            let mut ranks = known.range(first..=Worker::new(*instance_id, last)).peekable();
            if ranks.peek().is_none() {
                trusts.insert(first, 1.0);
            }
            trusts.extend(ranks.map(|(worker, trust)| (*worker, *trust)));
        }
    }
    let offer = |(worker, trust)| Offer { worker, overlap: overlaps.get(worker).copied(), trust };
    Ok(trusts.into_iter().map(offer).collect())
}

fn rejected(reject: Reject) -> ApiError {
    match reject {
        Reject::NoWorkers => ApiError::unavailable(
            "no worker of this partition is registered, and the call names none in workers",
        ),
        Reject::PinnedAbsent => {
            ApiError::bad("pinned names a worker that is not among those that may be chosen")
        }
        Reject::NoneEligible => ApiError::unavailable("no worker is eligible for this request now"),
    }
}

impl Prepared {
    fn selected(&self, worker: Worker, decision: Option<&Decision>) -> Selected {
        let listener = self.partition.listeners().into_iter().find(|(w, _)| *w == worker);
        let row = decision.and_then(|d| d.row(worker));
        Selected {
            worker: worker.into(),
            endpoint: listener.map(|(_, l)| l.endpoint.to_string()),
            block_size: self.ask.block_size_tokens,
            prompt_tokens: self.ask.prompt_tokens,
            cached_tokens: row.map_or(0, |row| row.cached_tokens),
            device: held(self.overlaps.get(worker).map_or(0, |o| o.device), self.ask.block_size_tokens),
            order: decision.map_or_else(Vec::new, |d| d.order.iter().map(|w| Name::from(*w)).collect()),
            policy: decision.map_or("", |d| d.policy),
            unit: decision.map_or("", |d| d.unit),
            picked_because: decision
                .map_or_else(|| "reserved before".to_owned(), |d| d.picked_because.to_string()),
            candidates: decision.map_or_else(Vec::new, explained),
            reservation_id: None,
            lease_ms: None,
        }
    }
}

/// The rows of a decision, cheapest first.
fn explained(decision: &Decision) -> Vec<Explained> {
    let mut rows: Vec<&Row> = decision.rows.iter().collect();
    rows.sort_by(|a, b| a.total.total_cmp(&b.total));
    let row = |row: &&Row| Explained {
        worker: row.worker.into(),
        cached_tokens: row.cached_tokens,
        terms: decision.columns.iter().copied().zip(row.terms).collect(),
        total: row.total.is_finite().then_some(row.total),
        filtered: row.filtered.map(FilterReason::name),
        load: row.load.into(),
    };
    rows.iter().take(ROWS_MAX).map(row).collect()
}

pub(super) async fn select(
    State(app): State<Arc<App>>,
    Input(asked): Input<Select>,
) -> Result<impl IntoResponse, ApiError> {
    if asked.reservation_id.is_some() || asked.lease_ms.is_some() {
        return Err(ApiError::bad(
            "reservation_id and lease_ms go with POST /v1/reservations: this call books nothing",
        ));
    }
    let prepared = prepare(&app, &asked)?;
    let (decision, worker) = app.selector.choose(&prepared.ask);
    Ok(Json(prepared.selected(worker.map_err(rejected)?, Some(&decision))))
}

pub(super) async fn reserve(
    State(app): State<Arc<App>>,
    Input(asked): Input<Select>,
) -> Result<impl IntoResponse, ApiError> {
    let lease_ms = asked.lease_ms.unwrap_or(LEASE_MS);
    if !(1..=LEASE_MS_MAX).contains(&lease_ms) {
        return Err(ApiError::bad(format!("lease_ms is not from 1 to {LEASE_MS_MAX}")));
    }
    let id = match &asked.reservation_id {
        Some(id) if id.is_empty() => return Err(ApiError::bad("reservation_id is empty")),
        Some(id) => name(id.clone(), "reservation_id")?,
        None => app.new_reservation_id(),
    };
    let prepared = prepare(&app, &asked)?;
    let booked = app.selector.reserve(&id, Duration::from_millis(lease_ms), &prepared.ask);
    let (status, mut selected, lease) = match booked {
        Ok(Booked::New(reserved, decision)) => {
            if app.registry.knowledge == Knowledge::Events {
                let until_ms = clock::now_ms() + PREDICTED.as_millis() as u64;
                prepared.partition.index.predict(reserved.worker, &prepared.blocks, until_ms);
            }
            (StatusCode::CREATED, prepared.selected(reserved.worker, Some(&decision)), reserved.lease)
        }
        Ok(Booked::Again(reserved)) => {
            (StatusCode::OK, prepared.selected(reserved.worker, None), reserved.lease)
        }
        Err(NotBooked::Reject(reject)) => return Err(rejected(reject)),
        Err(NotBooked::TooMany) => {
            return Err(ApiError::unavailable(format!(
                "{RESERVATIONS_MAX} reservations are held: free those that ended (DELETE /v1/reservations/ID)"
            )));
        }
    };
    selected.reservation_id = Some(id);
    selected.lease_ms = u64::try_from(lease.as_millis()).ok();
    Ok((status, Json(selected)))
}

fn done(found: bool) -> Result<impl IntoResponse, ApiError> {
    if found {
        Ok(Json(json!({ "status": "ok" })))
    } else {
        Err(ApiError::not_found("there is no such reservation: it was freed, or its lease ran out"))
    }
}

pub(super) async fn prefill_complete(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    done(app.selector.first_token(&id))
}

pub(super) async fn renew(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    done(app.selector.renew(&id))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Output {
    tokens: u32,
}

pub(super) async fn output(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Input(Output { tokens }): Input<Output>,
) -> Result<impl IntoResponse, ApiError> {
    done(app.selector.output(&id, tokens))
}

pub(super) async fn free(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    done(app.selector.free(&id))
}

#[derive(Serialize)]
struct WorkerLoad {
    #[serde(flatten)]
    worker: Name,
    #[serde(flatten)]
    load: LoadJson,
}

pub(super) async fn loads(State(app): State<Arc<App>>) -> impl IntoResponse {
    let (reservations, ends) = app.selector.figures();
    let workers: Vec<WorkerLoad> = app
        .selector
        .loads()
        .into_iter()
        .map(|(w, load)| WorkerLoad { worker: w.into(), load: load.into() })
        .collect();
    Json(json!({
        "reservations": reservations, "freed": ends.freed, "expired": ends.expired, "workers": workers,
    }))
}
