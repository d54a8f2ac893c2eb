//! What the router says of itself: models, health, readiness, workers, explanations, metrics.

use super::error::ClientError;
use super::plan::Ask;
use super::routes::{EXPLAIN_PREFIX, MODEL_PREFIX};
use super::{Gateway, Response, body, own};
use crate::explain::{Tokens, candidates};
use crate::fleet::Trust;
use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use kvlane_prompt::{Endpoint, RequestFields};
use kvlane_sched::RequestId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A worker that has been replaying for longer does not keep the router from being ready: its knowledge comes in as it may.
const REPLAY_WAIT_MAX_S: u64 = 10;

impl Gateway {
    /// `GET /v1/models`: what the healthy workers serve, each name once, in the engines' shape.
    pub(super) fn models(&self) -> Response {
        let data: Vec<Value> = self.model_cards().into_values().collect();
        json(StatusCode::OK, &json!({ "object": "list", "data": data }))
    }

    /// `GET /v1/models/{name}`.
    pub(super) fn model(&self, path: &str) -> Result<Response, ClientError> {
        let name = unescape(path.strip_prefix(MODEL_PREFIX).unwrap_or_default());
        let mut cards = self.model_cards();
        match cards.remove(&name) {
            Some(card) => Ok(json(StatusCode::OK, &card)),
            None => Err(ClientError::model_not_found(&name, cards.keys().map(String::as_str))),
        }
    }

    fn model_cards(&self) -> BTreeMap<String, Value> {
        let view = self.fleet.snapshot();
        let mut cards: BTreeMap<String, Value> = BTreeMap::new();
        for instance in view.instances.iter().filter(|i| i.health.is_healthy()) {
            for model in instance.facts.iter().flat_map(|f| &f.models) {
                let max_model_len = model.max_model_len;
                cards
                    .entry(model.id.clone())
                    .and_modify(|known| {
                        // Whatever the best worker can take: the gateway finds it.
                        if known["max_model_len"].as_u64() < max_model_len {
                            known["max_model_len"] = json!(max_model_len);
                        }
                    })
                    .or_insert_with(|| {
                        json!({
                            "id": model.id,
                            "object": "model",
                            "created": 0,
                            "owned_by": "kvlane",
                            "root": model.root,
                            "parent": model.parent,
                            "max_model_len": max_model_len,
                        })
                    });
            }
        }
        cards
    }

    /// `GET /ready`: 200 when requests can be served with the knowledge that there will be.
    pub(super) fn ready(&self) -> Response {
        let table = self.table.load_full();
        let mut waiting_for: Vec<String> = Vec::new();
        let mut healthy = 0;
        for instance in &table.view.instances {
            if !instance.health.is_healthy() {
                continue;
            }
            healthy += 1;
            let base = instance.facts.as_ref().map_or("", |f| f.base_model());
            if self.cache_aware && !base.is_empty() && !self.prompts.knows(base) {
                waiting_for.push(format!("the tokenizer of {base}"));
            }
            for rank in &instance.ranks {
                if rank.trust == Trust::Replaying && rank.since.elapsed().as_secs() < REPLAY_WAIT_MAX_S {
                    waiting_for.push(format!("the events of {}", table.worker_name(rank.worker)));
                }
            }
        }
        if healthy == 0 {
            waiting_for.push("a healthy worker".to_owned());
        }
        if self.is_draining() {
            waiting_for = vec!["nothing: this router is shutting down".to_owned()];
        }
        let ready = waiting_for.is_empty();
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let workers: Vec<Value> = table
            .view
            .instances
            .iter()
            .map(|i| json!({ "worker": i.name(), "health": i.health.name(), "reason": i.health.reason() }))
            .collect();
        let models: Vec<Value> = self
            .prompts
            .standings()
            .into_iter()
            .map(|(model, from)| {
                json!({ "model": model, "tokens_from": from.source, "tokens_differ": from.difference })
            })
            .collect();
        json(
            status,
            &json!({ "ready": ready, "waiting_for": waiting_for, "workers": workers, "models": models }),
        )
    }

    /// `GET /metrics`.
    pub(super) fn metrics_text(&self) -> Response {
        let mut response = text(self.metrics.text(&self.collect()));
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
        );
        response
    }

    /// `GET /kvlane/workers`: every rank of every instance, and what is known of it.
    pub(super) fn workers(&self) -> Response {
        let table = self.table.load_full();
        let standings = self.prompts.standings();
        let stats = self.fleet.stats();
        let mut workers: Vec<Value> = Vec::new();
        for instance in &table.view.instances {
            let facts = instance.facts.as_ref();
            let models: Vec<&str> = facts.iter().flat_map(|f| &f.models).map(|m| m.id.as_str()).collect();
            let base = facts.map_or("", |f| f.base_model());
            let tokens = standings.iter().find(|(model, _)| model == base).map(|(_, from)| from);
            let held = instance.partition.as_ref().map(|p| p.index.workers()).unwrap_or_default();
            let common = json!({
                "url": instance.base.to_string(),
                "health": instance.health.name(),
                "draining": table.upstream(instance.id).is_some_and(|u| u.draining.load(Ordering::Relaxed)),
                "role": instance.role.name(),
                "labels": instance.labels,
                "health_reason": instance.health.reason(),
                "engine": facts.map(|f| f.engine.name()),
                "version": facts.and_then(|f| f.version.as_deref()),
                "models": models,
                "tokens_from": tokens.map(|t| t.source),
                "tokens_differ": tokens.and_then(|t| t.difference.as_deref()),
                "block_size": facts.map(|f| f.block_size.tokens()),
                "capacity_blocks": facts.and_then(|f| f.capacity_blocks),
                "notes": facts.map(|f| f.notes.clone()).unwrap_or_default(),
            });
            if instance.ranks.is_empty() {
                let mut row = common.clone();
                row["worker"] = json!(instance.name());
                row["in_flight"] = json!(0);
                workers.push(row);
            }
            for rank in &instance.ranks {
                let (load, elsewhere) = self.desk.with(|books, _| {
                    (books.scheduler.ledger().load(rank.worker), books.scheduler.elsewhere(rank.worker))
                });
                let mut row = common.clone();
                row["worker"] = json!(table.worker_name(rank.worker));
                row["rank"] = json!(rank.worker.rank);
                row["events"] = json!(rank.trust.name());
                row["events_reason"] = json!(rank.trust.reason());
                let tiers = held.iter().filter(|h| h.worker == rank.worker);
                let mut blocks: BTreeMap<&str, u64> = BTreeMap::new();
                tiers.for_each(|h| *blocks.entry(h.tier.name()).or_default() += h.blocks);
                row["held_blocks"] = json!(blocks);
                if let Some((_, stats)) = stats.iter().find(|(worker, _)| *worker == rank.worker) {
                    row["event_stream"] = json!({
                        "connected": stats.connected,
                        "connect_error": stats.connect_error,
                        "epoch": stats.epoch,
                        "batches": stats.batches,
                        "stored": stats.stored_events,
                        "removed": stats.removed_events,
                        "cleared": stats.cleared_events,
                        "gaps": stats.gaps,
                        "restarts": stats.restarts,
                        "replays": stats.replays,
                        "dropped": stats.drops().map(|(reason, n)| (reason.name(), n)).collect::<BTreeMap<_, _>>(),
                        "blocks": stats.applied.by_status().into_iter().collect::<BTreeMap<_, _>>(),
                        "regained_blocks": {
                            "memory": stats.regained.memory,
                            "alike": stats.regained.alike,
                            "request": stats.regained.request,
                            "answer": stats.regained.answer,
                        },
                        "lag_s": stats.lag_s,
                        "heard_s_ago": stats.heard.map(|at| at.elapsed().as_secs_f64()),
                    });
                }
                row["in_flight"] = json!(load.requests());
                row["in_flight_elsewhere"] = json!(elsewhere.requests());
                row["load"] = json!({
                    "prefill_requests": load.prefill_requests,
                    "prefill_tokens": load.prefill_tokens,
                    "decode_requests": load.decode_requests,
                    "decode_tokens": load.decode_tokens,
                    "kv_tokens": load.kv_tokens(),
                });
                workers.push(row);
            }
        }
        let mut all = json!({ "workers": workers });
        if let Some(replicas) = &self.replicas {
            all["replicas"] = replicas.json();
        }
        if let Some(remote) = &self.remote {
            all["indexers"] = remote.json();
        }
        json(StatusCode::OK, &all)
    }

    /// `GET /kvlane/explain/{id}`.
    pub(super) fn explanation(&self, path: &str) -> Result<Response, ClientError> {
        let id = path.strip_prefix(EXPLAIN_PREFIX).unwrap_or_default();
        match self.explanations.find(id) {
            Some(record) => Ok(json(StatusCode::OK, &record.json())),
            None => Err(ClientError::new(
                StatusCode::NOT_FOUND,
                format!(
                    "No explanation of this id: the latest {} requests are kept.",
                    crate::explain::RECORDS_MAX
                ),
            )),
        }
    }

    /// `POST /kvlane/explain?path=/v1/chat/completions`: what would be decided for this body now. Changes nothing.
    pub(super) async fn dry_run(
        self: &Arc<Self>,
        arrived: Instant,
        head: &Parts,
        body: Incoming,
    ) -> Result<Response, ClientError> {
        let body: Bytes = body::read(body, self.max_body_bytes).await?;
        let asked = head.uri.query().and_then(|q| q.split('&').find_map(|pair| pair.strip_prefix("path=")));
        let (path, endpoint) = match asked.map(unescape).as_deref() {
            None | Some("/v1/chat/completions") => ("/v1/chat/completions", Endpoint::Chat),
            Some("/v1/completions") => ("/v1/completions", Endpoint::Completions),
            Some(_) => {
                return Err(ClientError::bad_request(
                    "`path` must be /v1/chat/completions or /v1/completions: other endpoints are routed by load.",
                ));
            }
        };
        let fields =
            RequestFields::parse(endpoint, body.clone()).map_err(|bad| ClientError::bad_field(&bad))?;
        let fields = Arc::new(fields);
        let ask =
            Ask { arrived, path, headers: &head.headers, fields: Some(&fields), body_bytes: body.len() };
        let plan = self.plan(&ask).await?;
        // No request in flight has this id: real ones count up from 1.
        let (decision, result) = self.decide(&plan, RequestId(0));
        let worker = decision.worker();
        Ok(json(
            StatusCode::OK,
            &json!({
                "path": path,
                "model": fields.model,
                "policy": decision.policy,
                "prompt_tokens": decision.prompt_tokens,
                "tokens_from": plan.tokens().name(),
                "tokens_unknown_because": match plan.tokens() { Tokens::Unknown(why) => Some(why), _ => None },
                "tokens_hash": plan.tokens_hash().map(|hash| format!("{hash:016x}")),
                "worker": worker.map(|w| plan.table.worker_name(w)),
                "rejected_because": result.err().map(|reject| reject.to_string()),
                "picked_because": decision.picked_because.to_string(),
                "unit": decision.unit,
                "candidates": candidates(&decision, &plan.table),
                "predicted_cached_tokens": worker.and_then(|w| plan.predicted_tokens(w)),
            }),
        ))
    }
}

/// A path segment with its `%XX` escapes decoded; what is no escape stays as it is.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = (byte == b'%').then(|| std::str::from_utf8(tail.get(..2)?).ok()).flatten();
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                out.push(decoded);
                rest = &tail[2..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A response of JSON.
pub(super) fn json(status: StatusCode, value: &Value) -> Response {
    let mut response = hyper::Response::new(own(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A response of plain text.
pub(super) fn text(text: impl Into<Bytes>) -> Response {
    let mut response = hyper::Response::new(own(text));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
