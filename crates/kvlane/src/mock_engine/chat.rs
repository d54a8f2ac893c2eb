//! `POST /v1/chat/completions`.

use super::error::Refusal;
use super::generate::{self, Said, Usage};
use super::life::Life;
use super::openai::{Chat, flatten};
use super::stream::{Answers, Head, answer};
use super::tokenizer::{encode, render};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
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
    let answers = ChatAnswers {
        head: Head::new(&life, &headers, "chatcmpl", &job.model),
        prompt: common.return_token_ids.unwrap_or(false).then(|| job.prompts[0].clone()),
        prompt_tokens: job.prompts[0].len(),
        whole_blocks: job.prompts[0].len() as u32 / life.config.block_size() * life.config.block_size(),
    };
    answer(life, answers, job, common).await
}

struct ChatAnswers {
    head: Head,
    /// The prompt's tokens, where the client asked for token ids.
    prompt: Option<Vec<u32>>,
    prompt_tokens: usize,
    whole_blocks: u32,
}

impl ChatAnswers {
    fn chunk(&self, choice: Value) -> Value {
        self.head.object(Self::CHUNK, &[choice])
    }
}

impl Answers for ChatAnswers {
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn head(&self) -> &Head {
        &self.head
    }

    fn choice(&self, said: &Said) -> Value {
        json!({
            "index": said.index,
            "message": {"role": "assistant", "content": said.text(), "refusal": null, "annotations": null,
                        "audio": null, "function_call": null, "reasoning": null},
            "logprobs": null,
            "finish_reason": said.finish_reason(),
            "stop_reason": null,
            "token_ids": self.prompt.as_ref().map(|_| &said.tokens),
            "routed_experts": null,
        })
    }

    fn extras(&self, whole: &mut Value) {
        whole["prompt_logprobs"] = Value::Null;
        whole["prompt_token_ids"] = json!(self.prompt);
        whole["prompt_text"] = Value::Null;
    }

    fn opening(&self, said: &Said) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": said.index, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.chunk(choice);
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
        self.chunk(choice)
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
