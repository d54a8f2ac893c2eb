//! `POST /v1/completions`.

use super::error::Refusal;
use super::generate::{self, Job, Said, Usage};
use super::life::Life;
use super::openai::{Completion, Prompts};
use super::stream::{Chunks, Reporting, respond};
use super::tokenizer::{decode, encode};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// What completions generate unless told.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub(super) async fn completions(
    State(life): State<Arc<Life>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let request: Completion = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    let prompts = match request.prompt {
        Prompts::Text(text) => vec![encode(&text)],
        Prompts::Tokens(tokens) => vec![tokens],
        Prompts::Texts(texts) => texts.iter().map(|text| encode(text)).collect(),
        Prompts::TokenLists(lists) => lists,
    };
    if prompts.is_empty() {
        return Err(Refusal::bad(None, "You must pass at least one prompt"));
    }
    let common = request.common;
    let job = generate::start(&life, &headers, &common, prompts, Some(DEFAULT_MAX_TOKENS)).await?;
    let head = Head {
        id: life.response_id("cmpl", &headers),
        created: life.now_s(),
        model: job.model.clone(),
        token_ids: common.return_token_ids.unwrap_or(false),
        echo: request.echo,
        prompts: job.prompts.clone(),
        fingerprint: life.fingerprint(),
    };
    if common.stream.unwrap_or(false) {
        let reporting = Reporting::of(common.stream_options);
        let dies = life.draw_death();
        let (said, steps) = job.into_stream();
        return Ok(respond(life, head, said, steps, reporting, dies));
    }
    let _in_flight = life.count_in_flight();
    whole(&life, &head, job).await
}

async fn whole(life: &Life, head: &Head, mut job: Job) -> Result<Response, Refusal> {
    let cached = job.finish().await?;
    let usage = head.count(life.config.report_cached_tokens.then_some(cached), job.completion_tokens());
    let choices: Vec<Value> = job
        .said
        .iter()
        .map(|choice| {
            let prompt = &job.prompts[choice.prompt];
            json!({
                "index": choice.index,
                "text": head.echoed(prompt) + &choice.text(),
                "logprobs": null,
                "finish_reason": choice.finish_reason(),
                "stop_reason": null,
                "token_ids": head.token_ids.then_some(&choice.tokens),
                "prompt_logprobs": null,
                "prompt_token_ids": head.token_ids.then_some(prompt),
                "routed_experts": null,
            })
        })
        .collect();
    Ok(Json(json!({
        "id": head.id, "object": "text_completion", "created": head.created, "model": head.model,
        "choices": choices,
        "service_tier": null, "system_fingerprint": head.fingerprint,
        "usage": usage.whole(),
        "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null,
    }))
    .into_response())
}

/// What every chunk of a response repeats.
struct Head {
    id: String,
    created: u64,
    model: String,
    token_ids: bool,
    echo: bool,
    prompts: Vec<Vec<u32>>,
    fingerprint: String,
}

impl Head {
    fn chunk(&self, choices: &[Value]) -> Value {
        json!({"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
               "choices": choices})
    }

    fn echoed(&self, prompt: &[u32]) -> String {
        if self.echo { decode(prompt, false) } else { String::new() }
    }
}

impl Chunks for Head {
    fn opening(&self, _: &Said) -> Option<Value> {
        None
    }

    fn token(&self, said: &Said, index: usize, last: bool) -> Value {
        let prompt = &self.prompts[said.prompt];
        let text =
            if index == 0 { self.echoed(prompt) + &said.token_text(index) } else { said.token_text(index) };
        self.chunk(&[json!({
            "index": said.index,
            "text": text,
            "logprobs": null,
            "finish_reason": last.then(|| said.finish_reason()),
            "stop_reason": null,
            "prompt_token_ids": (self.token_ids && index == 0).then_some(prompt),
            "token_ids": self.token_ids.then(|| [said.tokens[index]]),
        })])
    }

    fn usage(&self, usage: Value) -> Value {
        let mut chunk = self.chunk(&[]);
        chunk["usage"] = usage;
        chunk["system_fingerprint"] = json!(self.fingerprint);
        chunk
    }

    fn count(&self, cached: Option<u32>, completion: usize) -> Usage {
        Usage {
            prompt_tokens: self.prompts.iter().map(Vec::len).sum(),
            completion_tokens: completion,
            cached_tokens: cached,
            created_cache_tokens: None,
        }
    }
}
