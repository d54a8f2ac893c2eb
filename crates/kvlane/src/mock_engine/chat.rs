//! `POST /v1/chat/completions`.

use super::error::Refusal;
use super::generate::{self, Job, Said, Usage};
use super::life::Life;
use super::openai::{Chat, flatten};
use super::stream::{Chunks, Reporting, respond};
use super::tokenizer::{encode, render};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn chat(
    State(life): State<Arc<Life>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let mut chat: Chat = serde_json::from_slice(&body).map_err(|error| Refusal::unreadable(&error))?;
    chat.common.max_tokens = chat.max_completion_tokens.or(chat.common.max_tokens);
    let prompt = encode(&render(&flatten(&chat.messages)?, chat.add_generation_prompt));
    let common = chat.common;
    let job = generate::start(&life, &headers, &common, vec![prompt], None).await?;
    let head = Head {
        id: life.response_id("chatcmpl", &headers),
        created: life.now_s(),
        model: job.model.clone(),
        prompt: common.return_token_ids.unwrap_or(false).then(|| job.prompts[0].clone()),
        prompt_tokens: job.prompts[0].len(),
        whole_blocks: job.prompts[0].len() as u32 / life.config.block_size() * life.config.block_size(),
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
            json!({
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text(), "refusal": null, "annotations": null,
                            "audio": null, "function_call": null, "reasoning": null},
                "logprobs": null,
                "finish_reason": choice.finish_reason(),
                "stop_reason": null,
                "token_ids": head.prompt.as_ref().map(|_| &choice.tokens),
                "routed_experts": null,
            })
        })
        .collect();
    Ok(Json(json!({
        "id": head.id, "object": "chat.completion", "created": head.created, "model": head.model,
        "choices": choices,
        "service_tier": null, "system_fingerprint": head.fingerprint,
        "usage": usage.whole(),
        "prompt_logprobs": null, "prompt_token_ids": head.prompt, "prompt_text": null,
        "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null,
    }))
    .into_response())
}

/// What every chunk of a response repeats.
struct Head {
    id: String,
    created: u64,
    model: String,
    /// The prompt's tokens, where the client asked for token ids.
    prompt: Option<Vec<u32>>,
    prompt_tokens: usize,
    whole_blocks: u32,
    fingerprint: String,
}

impl Head {
    fn chunk(&self, choices: &[Value]) -> Value {
        json!({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
               "choices": choices})
    }
}

impl Chunks for Head {
    fn opening(&self, said: &Said) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": said.index, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.chunk(&[choice]);
        chunk["prompt_token_ids"] = json!(self.prompt);
        chunk["prompt_text"] = Value::Null;
        Some(chunk)
    }

    fn token(&self, said: &Said, index: usize, last: bool) -> Value {
        let mut choice = json!({"index": said.index, "delta": {"content": said.token_text(index)}, "logprobs": null,
                                "finish_reason": last.then(|| said.finish_reason())});
        if last {
            choice["stop_reason"] = Value::Null;
        }
        choice["token_ids"] = json!(self.prompt.as_ref().map(|_| [said.tokens[index]]));
        self.chunk(&[choice])
    }

    fn usage(&self, usage: Value) -> Value {
        let mut chunk = self.chunk(&[]);
        chunk["usage"] = usage;
        chunk["system_fingerprint"] = json!(self.fingerprint);
        chunk
    }

    fn count(&self, cached: Option<u32>, completion: usize) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: completion,
            cached_tokens: cached,
            created_cache_tokens: cached.map(|cached| self.whole_blocks.saturating_sub(cached)),
        }
    }
}
