//! `POST /v1/completions`.

use super::error::Refusal;
use super::generate::{self, Said, Usage};
use super::life::Life;
use super::openai::{Completion, Prompts};
use super::stream::{Answers, Head, answer};
use super::tokenizer::{decode, encode};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
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
    let answers = CompletionAnswers {
        head: Head::new(&life, &headers, "cmpl", &job.model),
        token_ids: common.return_token_ids.unwrap_or(false),
        echo: request.echo,
        prompts: job.prompts.clone(),
    };
    answer(life, answers, job, common).await
}

struct CompletionAnswers {
    head: Head,
    token_ids: bool,
    echo: bool,
    prompts: Vec<Vec<u32>>,
}

impl CompletionAnswers {
    fn echoed(&self, prompt: &[u32]) -> String {
        if self.echo { decode(prompt, false) } else { String::new() }
    }
}

impl Answers for CompletionAnswers {
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn head(&self) -> &Head {
        &self.head
    }

    fn choice(&self, said: &Said) -> Value {
        let prompt = &self.prompts[said.prompt];
        json!({
            "index": said.index,
            "text": self.echoed(prompt) + &said.text(),
            "logprobs": null,
            "finish_reason": said.finish_reason(),
            "stop_reason": null,
            "token_ids": self.token_ids.then_some(&said.tokens),
            "prompt_logprobs": null,
            "prompt_token_ids": self.token_ids.then_some(prompt),
            "routed_experts": null,
        })
    }

    fn opening(&self, _: &Said) -> Option<Value> {
        None
    }

    fn token(&self, said: &Said, index: usize, last: bool) -> Value {
        let prompt = &self.prompts[said.prompt];
        let text =
            if index == 0 { self.echoed(prompt) + &said.token_text(index) } else { said.token_text(index) };
        self.head.object(
            Self::CHUNK,
            &[json!({
                "index": said.index,
                "text": text,
                "logprobs": null,
                "finish_reason": last.then(|| said.finish_reason()),
                "stop_reason": null,
                "prompt_token_ids": (self.token_ids && index == 0).then_some(prompt),
                "token_ids": self.token_ids.then(|| [said.tokens[index]]),
            })],
        )
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
