//! From a prompt to the answers that an engine gives: what chats and completions share.

use super::answer::{Limits, answer};
use super::error::Refusal;
use super::life::Life;
use super::openai::Common;
use super::rank::Ticket;
use super::tokenizer::{VOCABULARY, decode};
use super::transfer;
use axum::http::HeaderMap;
use futures_util::stream::{BoxStream, SelectAll, StreamExt as _, unfold};
use kvlane_engine::{Content, Request, Token};
use kvlane_index::hash::{Namespace, prompt_hashes};
use serde_json::{Value, json};
use std::sync::Arc;

/// Prompts times `n` in one request.
const CHOICES_MAX: usize = 128;

/// What an answer says; the engine decides when.
pub(super) struct Said {
    /// Its number in the response.
    pub(super) index: usize,
    /// Which prompt it answers.
    pub(super) prompt: usize,
    /// All its tokens.
    pub(super) tokens: Vec<u32>,
    /// Whether it ends by itself.
    ends: bool,
}

/// A request that the engine has taken: all its answers.
pub(super) struct Job {
    pub(super) model: String,
    pub(super) prompts: Vec<Vec<u32>>,
    /// The answers, in order.
    pub(super) said: Vec<Said>,
    /// The engine's part of each.
    tickets: Vec<Ticket>,
}

/// A token of one of a job's answers; `None` when the engine died.
pub(super) type Step = (usize, Option<Token>);

/// Checks a request and submits all its answers to one rank.
pub(super) async fn start(
    life: &Life,
    headers: &HeaderMap,
    common: &Common,
    prompts: Vec<Vec<u32>>,
    default_max_tokens: Option<u32>,
) -> Result<Job, Refusal> {
    let served = &life.config.model;
    let model = common.model.clone().unwrap_or_else(|| served.clone());
    let adapter = life.adapter(&model);
    if adapter.is_none() && model != *served {
        return Err(Refusal::no_model(&model, served));
    }
    let n = common.n.unwrap_or(1).max(1) as usize;
    if n * prompts.len() > CHOICES_MAX {
        return Err(Refusal::bad(Some("n"), format!("at most {CHOICES_MAX} answers to one request")));
    }
    if common.cache_salt.as_deref() == Some("") {
        return Err(Refusal::bad(None, "Parameter 'cache_salt' must be a non-empty string if provided."));
    }
    transfer::check(common.kv_transfer_params.as_ref())?;
    let rank = life.rank(headers)?;
    let mut said = Vec::with_capacity(n * prompts.len());
    let mut tickets = Vec::with_capacity(n * prompts.len());
    for (prompt_number, prompt) in prompts.iter().enumerate() {
        let max_tokens =
            max_tokens(prompt, common.max_tokens, default_max_tokens, life.config.max_model_len)?;
        for variant in 0..n {
            let limits = Limits {
                max_tokens,
                min_tokens: common.min_tokens.min(max_tokens),
                ignore_end: common.ignore_eos,
            };
            let (tokens, ends) =
                answer(prompt, common.seed.unwrap_or(0).wrapping_add(variant as u64) << 1, &limits);
            let whole = [prompt.as_slice(), tokens.as_slice()].concat();
            let namespace = Namespace {
                adapter: adapter.as_ref().map(|a| a.1.as_str()),
                salt: common.cache_salt.as_deref(),
                ..Namespace::default()
            };
            let mut blocks = Vec::new();
            // The last token is never computed, so no block that needs it becomes full.
            prompt_hashes(&whole[..whole.len() - 1], life.config.engine.block_size, &namespace, &mut blocks);
            let (prompt_tokens, output_tokens) = (prompt.len() as u32, tokens.len() as u32);
            let content = Arc::new(Content {
                tokens: whole,
                adapter: adapter.clone(),
                salt: common.cache_salt.clone(),
            });
            let ticket = rank
                .submit(|id| Request { id, prompt_tokens, output_tokens, blocks, content: Some(content) })
                .await
                .map_err(Refusal::not_taken)?;
            tickets.push(ticket);
            said.push(Said { index: said.len(), prompt: prompt_number, tokens, ends });
        }
    }
    Ok(Job { model, prompts, said, tickets })
}

fn max_tokens(
    prompt: &[u32],
    asked: Option<i64>,
    default: Option<u32>,
    max_len: u32,
) -> Result<u32, Refusal> {
    if prompt.is_empty() {
        return Err(Refusal::bad(None, "You must pass at least one prompt"));
    }
    if let Some(token) = prompt.iter().find(|token| **token >= VOCABULARY) {
        return Err(Refusal::bad(None, format!("Token id {token} is out of vocabulary")));
    }
    let length = prompt.len();
    let room = max_len.checked_sub(length as u32).filter(|room| *room > 0).ok_or_else(|| {
        Refusal::bad(
            Some("input_tokens"),
            format!(
                "This model's maximum context length is {max_len} tokens. However, your prompt contains {length} \
                 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of \
                 the input prompt. (parameter=input_tokens, value={length})"
            ),
        )
    })?;
    match asked {
        None => Ok(default.unwrap_or(room).min(room)),
        Some(asked) if asked < 1 => Err(Refusal::bad(
            Some("max_tokens"),
            format!("max_tokens must be at least 1, got {asked}. (parameter=max_tokens, value={asked})"),
        )),
        Some(asked) => u32::try_from(asked).ok().filter(|asked| *asked <= room).ok_or_else(|| {
            Refusal::bad(
                Some("max_tokens"),
                format!(
                    "max_tokens={asked} is too many for a prompt of {length} tokens and max_model_len={max_len}. \
                     Please request fewer output tokens. (parameter=max_tokens, value={asked})"
                ),
            )
        }),
    }
}

impl Said {
    /// The text of the whole answer.
    pub(super) fn text(&self) -> String {
        decode(&self.tokens, true)
    }

    /// The text of one token.
    pub(super) fn token_text(&self, token: usize) -> String {
        decode(&self.tokens[token..=token], true)
    }

    /// Why it ends.
    pub(super) fn finish_reason(&self) -> &'static str {
        if self.ends { "stop" } else { "length" }
    }
}

impl Job {
    /// Waits for every answer; the prompt tokens found in the cache for the first one.
    pub(super) async fn finish(&mut self) -> Result<u32, Refusal> {
        let mut cached = None;
        for ticket in &mut self.tickets {
            loop {
                let token = ticket.next().await.ok_or_else(|| Refusal::not_taken(None))?;
                cached.get_or_insert(token.cached_tokens);
                if token.last {
                    break;
                }
            }
        }
        Ok(cached.unwrap_or(0))
    }

    /// What the answers say, and their tokens in the order in which they come.
    pub(super) fn into_stream(self) -> (Vec<Said>, SelectAll<BoxStream<'static, Step>>) {
        let mut steps = SelectAll::new();
        for (index, ticket) in self.tickets.into_iter().enumerate() {
            let tokens = unfold(Some(ticket), move |ticket| async move {
                let mut ticket = ticket?;
                let token = ticket.next().await;
                let more = token.is_some_and(|token| !token.last);
                Some(((index, token), more.then_some(ticket)))
            });
            steps.push(tokens.boxed());
        }
        (self.said, steps)
    }

    /// Tokens of all answers.
    pub(super) fn completion_tokens(&self) -> usize {
        self.said.iter().map(|said| said.tokens.len()).sum()
    }
}

/// What a response's `usage` says.
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    /// `None` where the engine does not report it.
    pub(super) cached_tokens: Option<u32>,
    /// Prompt tokens in whole blocks that were computed; chats report it, completions do not.
    pub(super) created_cache_tokens: Option<u32>,
}

impl Usage {
    /// As a whole response has it.
    pub(super) fn whole(&self) -> Value {
        let details = self.cached_tokens.map(|cached| {
            json!({"cached_tokens": cached, "created_cache_tokens": self.created_cache_tokens, "multimodal_tokens": null})
        });
        json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": details,
            "completion_tokens_details": null,
        })
    }

    /// As the last chunk of a stream has it: what is not known is not there.
    pub(super) fn streamed(&self) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        });
        if let Some(cached) = self.cached_tokens {
            let mut details = json!({ "cached_tokens": cached });
            if let Some(created) = self.created_cache_tokens {
                details["created_cache_tokens"] = created.into();
            }
            usage["prompt_tokens_details"] = details;
        }
        usage
    }
}
