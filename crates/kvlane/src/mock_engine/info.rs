//! Everything that is not generation: what a router asks an engine about, and the mock's own switches.

use super::error::Refusal;
use super::faults::Faults;
use super::life::Life;
use super::openai::{Detokenize, Tokenize, flatten};
use super::tokenizer::{decode, encode, render};
use super::{Control, Restart};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

type Shared = State<Arc<Life>>;

pub(super) async fn health() -> StatusCode {
    StatusCode::OK
}

pub(super) async fn version(State(life): Shared) -> Json<Value> {
    Json(json!({"version": life.config.version}))
}

pub(super) async fn load(State(life): Shared) -> Json<Value> {
    Json(json!({"server_load": life.in_flight.load(Ordering::Relaxed)}))
}

pub(super) async fn models(State(life): Shared) -> Json<Value> {
    let created = life.now_s();
    let card = |id: &str, root: &str, parent: Option<&str>, max_model_len: Option<u32>| {
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
            "max_model_len": max_model_len,
            "permission": [{
                "id": format!("modelperm-{id}"), "object": "model_permission", "created": created,
                "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true,
                "allow_search_indices": false, "allow_view": true, "allow_fine_tuning": false,
                "organization": "*", "group": null, "is_blocking": false,
            }],
        })
    };
    let config = &life.config;
    let root = config.model_directory.as_ref().map_or(config.model.clone(), |d| d.display().to_string());
    let mut cards = vec![card(&config.model, &root, None, Some(config.max_model_len))];
    cards.extend(life.adapter_names().iter().map(|name| card(name, name, Some(&config.model), None)));
    Json(json!({"object": "list", "data": cards}))
}

pub(super) async fn kv_event_sources(State(life): Shared) -> Json<Value> {
    let sources: Map<String, Value> = life
        .publishers
        .iter()
        .enumerate()
        .map(|(rank, publisher)| {
            let events = life.config.events.as_ref();
            let source = json!({
                "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": publisher.endpoint,
                "replay_endpoint": publisher.replay_endpoint,
                "buffer_steps": events.map(|events| events.buffer_steps), "hwm": 100_000,
                "max_queue_size": 100_000, "topic": events.map(|events| &events.topic),
            });
            (rank.to_string(), source)
        })
        .collect();
    Json(Value::Object(sources))
}

pub(super) async fn reset_prefix_cache(State(life): Shared) -> Json<Value> {
    let mut success = true;
    for rank in &life.ranks {
        success &= rank.reset().await;
    }
    Json(json!({ "success": success }))
}

pub(super) async fn tokenize(State(life): Shared, body: Bytes) -> Result<Json<Value>, Refusal> {
    let request: Tokenize = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    let text = match (&request.messages, request.prompt) {
        (Some(messages), _) => render(&flatten(messages)?, request.add_generation_prompt),
        (None, Some(prompt)) => prompt,
        (None, None) => return Err(Refusal::bad(None, "give `messages` or `prompt`")),
    };
    let tokens = encode(&text);
    let strings = request
        .return_token_strs
        .then(|| tokens.iter().map(|token| decode(std::slice::from_ref(token), false)).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(), "max_model_len": life.config.max_model_len, "tokens": tokens, "token_strs": strings,
    })))
}

pub(super) async fn detokenize(body: Bytes) -> Result<Json<Value>, Refusal> {
    let request: Detokenize = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    Ok(Json(json!({"prompt": decode(&request.tokens, false)})))
}

#[derive(Deserialize)]
struct Adapter {
    lora_name: String,
}

pub(super) async fn load_adapter(State(life): Shared, body: Bytes) -> Result<Response, Refusal> {
    let Adapter { lora_name } = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    if !life.load_adapter(&lora_name) {
        return Err(Refusal::bad(None, format!("The lora adapter '{lora_name}' has already been loaded.")));
    }
    Ok(format!("Success: LoRA adapter '{lora_name}' added successfully.").into_response())
}

pub(super) async fn unload_adapter(State(life): Shared, body: Bytes) -> Result<Response, Refusal> {
    let Adapter { lora_name } = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    if !life.unload_adapter(&lora_name) {
        return Err(Refusal::no_model(&lora_name, &life.config.model));
    }
    Ok(format!("Success: LoRA adapter '{lora_name}' removed successfully.").into_response())
}

/// `POST /mock/faults`: replaces the faults; what the body does not name is off.
pub(super) async fn set_faults(State(life): Shared, body: Bytes) -> Result<Json<Value>, Refusal> {
    let faults: Faults = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    life.faults.send_replace(faults);
    Ok(Json(json!({"success": true})))
}

/// `POST /mock/restart`: this life ends at once, the next begins after `down_ms`.
pub(super) async fn restart(State(life): Shared, body: Bytes) -> Result<Json<Value>, Refusal> {
    let restart: Restart = if body.is_empty() {
        Restart::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?
    };
    let _ = life.control.try_send(Control::Restart(restart));
    Ok(Json(json!({"success": true})))
}

/// What the engine's own framework answers on a path that it does not have.
pub(super) async fn not_found() -> (StatusCode, Json<Value>) {
    (StatusCode::NOT_FOUND, Json(json!({"detail": "Not Found"})))
}
