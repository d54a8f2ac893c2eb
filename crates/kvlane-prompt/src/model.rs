//! One model's way from request to tokens.

use crate::chat::{self, ChatInputs};
use crate::error::{LoadError, PromptError, Unroutable};
use crate::prefix_cache::{CacheStats, Known, Prefix};
use crate::request::{Endpoint, PromptInput, RequestFields, prompt_inputs};
use crate::template::ChatTemplates;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// How the engines of a model are set up, as far as it changes prompts. The default is an engine's default.
#[derive(Clone, Debug)]
pub struct PromptConfig {
    /// The engine's `--chat-template`: the template's text, in place of the model's own.
    pub chat_template: Option<String>,
    /// The engine's `--chat-template-content-format`; `None` = found out from the template ("auto").
    pub content_format: Option<ContentFormat>,
    /// The engine's `--default-chat-template-kwargs`.
    pub default_template_kwargs: Map<String, Json>,
    /// The engine's `--exclude-tools-when-tool-choice-none`.
    pub exclude_tools_when_tool_choice_none: bool,
    /// The engine's context length in tokens; `None` = not known, so that nothing is too long.
    pub max_model_len: Option<u32>,
    /// Most bytes to keep of texts and their tokens, so that a known conversation costs its new text only; 0 = keep none.
    pub cache_bytes: usize,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            chat_template: None,
            content_format: None,
            default_template_kwargs: Map::new(),
            exclude_tools_when_tool_choice_none: false,
            max_model_len: None,
            cache_bytes: 256 << 20,
        }
    }
}

/// How a message's content reaches the template.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ContentFormat {
    /// As one string; parts are joined by line feeds.
    String,
    /// As a list of parts, each `{"type": …, …}`.
    Parts,
}

/// One prompt of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prompt {
    /// The token ids that the engine will see, special tokens included.
    pub tokens: Vec<u32>,
    /// How many of the leading tokens were known before: their text cost a look-up, not a tokenization.
    pub known_tokens: usize,
    /// Names of some of its beginnings, shortest first; empty where nothing is kept.
    pub prefixes: Vec<Prefix>,
}

/// One model's tokenizer and chat template. Shared by all threads.
#[derive(Debug)]
pub struct ModelPrompt {
    tokenizer: Tokenizer,
    templates: ChatTemplates,
    config: PromptConfig,
}

impl ModelPrompt {
    /// Reads a model's directory, or a tokenizer's file with what lies beside it.
    ///
    /// Looks for `tokenizer.json` (else `tiktoken.model`, else a tiktoken file named `tokenizer.model`),
    /// `tokenizer_config.json`, `special_tokens_map.json`, `config.json` and `chat_template.jinja`; only the first must be
    /// there. Without a chat template, chats are [`Unroutable::NoTemplate`].
    pub fn load(path: &Path, config: PromptConfig) -> Result<Self, LoadError> {
        const FILES: [&str; 3] = ["tokenizer.json", "tiktoken.model", "tokenizer.model"];
        let (dir, file) = if path.is_dir() {
            let found = FILES.iter().map(|name| path.join(name)).find(|file| file.exists());
            (path.to_path_buf(), found.unwrap_or_else(|| path.join(FILES[0])))
        } else {
            (path.parent().map(Path::to_path_buf).unwrap_or_default(), path.to_path_buf())
        };
        let settings = crate::tokenizer::TokenizerConfig::load(&dir)?;
        let tokenizer = Tokenizer::load(&file, &settings, config.cache_bytes)?;
        let templates = ChatTemplates::load(&dir, &settings, &config)?;
        Ok(Self { tokenizer, templates, config })
    }

    /// The prompts of `request`, one for each element of a batch, in its order.
    ///
    /// `local_unix_s` is the time that a template's `strftime_now` prints: seconds since the epoch in the *engine's*
    /// time zone (containers run in UTC, so nearly always the plain Unix time).
    pub fn tokens(&self, request: &RequestFields, local_unix_s: i64) -> Result<Vec<Prompt>, PromptError> {
        let found = self.tokens_within(request, local_unix_s, usize::MAX)?;
        Ok(found.expect("nothing is longer than all that can be addressed"))
    }

    /// [`tokens`](Self::tokens), unless that takes long: `None` if more than `new_bytes_max` of a prompt's text were never tokenized before.
    ///
    /// For a thread that others wait for: 16 kB of new text are about a millisecond, a megabyte of known text is another. Trying costs the
    /// request's rendering, and what was tokenized until then is kept.
    pub fn tokens_within(
        &self,
        request: &RequestFields,
        local_unix_s: i64,
        new_bytes_max: usize,
    ) -> Result<Option<Vec<Prompt>>, PromptError> {
        match request.endpoint() {
            Endpoint::Other => Err(Unroutable::NoPrompt.into()),
            Endpoint::Completions => self.completion(request, new_bytes_max),
            Endpoint::Chat => {
                let text = self.render(request, local_unix_s)?;
                let special = request.add_special_tokens.unwrap_or(false);
                Ok(self.tokenize(request, &text, special, new_bytes_max)?.map(|prompt| vec![prompt]))
            }
        }
    }

    /// The text that a chat request is rendered to, before tokenization.
    pub fn render(&self, request: &RequestFields, local_unix_s: i64) -> Result<String, PromptError> {
        if request.add_generation_prompt && request.continue_final_message {
            return Err(Unroutable::Rejected.into());
        }
        let mut variables = chat::variables(request, &self.config)?;
        let tools = chat::tools(request, &self.config, &mut variables)?;
        let template = self.templates.select(!tools.is_null()).ok_or(Unroutable::NoTemplate)?;
        let format = self.config.content_format.unwrap_or(template.content_format);
        let messages = chat::messages(request, format, template.knows_developer())?;
        if messages.is_empty() {
            return Err(Unroutable::Rejected.into());
        }
        variables.remove("continue_final_message");
        let continue_final_message = request.continue_final_message;
        let inputs = ChatInputs { messages, tools, variables, continue_final_message };
        Ok(template.render(inputs, local_unix_s)?)
    }

    fn completion(
        &self,
        request: &RequestFields,
        new_bytes_max: usize,
    ) -> Result<Option<Vec<Prompt>>, PromptError> {
        if request.has_prompt_embeds() {
            return Err(Unroutable::PromptEmbeds.into());
        }
        if request.has_suffix() {
            return Err(Unroutable::Suffix.into());
        }
        let Some(json) = request.prompt_json() else { return Err(Unroutable::NoPrompt.into()) };
        let special = request.add_special_tokens.unwrap_or(true);
        prompt_inputs(json)?
            .into_iter()
            .map(|input| match input {
                PromptInput::Text(text) if text.is_empty() => Err(Unroutable::Rejected.into()),
                PromptInput::Text(text) => self.tokenize(request, &text, special, new_bytes_max),
                PromptInput::Tokens(tokens) => {
                    self.fit(request, Known { tokens, ..Known::default() }).map(Some)
                }
            })
            .collect()
    }

    /// Tokenizes and truncates as the request asks and the engine's limit says.
    fn tokenize(
        &self,
        request: &RequestFields,
        text: &str,
        special: bool,
        new_bytes_max: usize,
    ) -> Result<Option<Prompt>, PromptError> {
        let limit = self.limit(request);
        // With a side given the engine cuts afterwards, through the special tokens too.
        let early = if request.truncate_left.is_none() { limit } else { None };
        let mut text = text;
        if let Some(max) = self.config.max_model_len.map(|len| self.tokenizer.max_chars(len as usize))
            && text.len() > max
        {
            match (request.truncate_prompt_tokens, request.truncate_left) {
                (None, _) if text.chars().count() > max => return Err(Unroutable::TooLong.into()),
                (Some(_), Some(true)) => {
                    let cut = text.char_indices().rev().nth(max.saturating_sub(1)).map_or(0, |(at, _)| at);
                    text = &text[cut..];
                }
                (Some(_), Some(false)) => {
                    let cut = text.char_indices().nth(max).map_or(text.len(), |(at, _)| at);
                    text = &text[..cut];
                }
                _ => {}
            }
        }
        let encoded = self.tokenizer.encode(text, special, early, new_bytes_max)?;
        encoded.map(|encoded| self.fit(request, encoded)).transpose()
    }

    /// Most tokens of the prompt to keep, if the request asks for truncation.
    fn limit(&self, request: &RequestFields) -> Option<usize> {
        match (request.truncate_prompt_tokens?, self.config.max_model_len) {
            (n, _) if n >= 0 => usize::try_from(n).ok(),
            // As long as the model takes, less a token held back for the answer.
            (_, Some(len)) => Some((len as usize).saturating_sub(usize::from(asks_for_tokens(request)))),
            (_, None) => None,
        }
    }

    /// Truncates, by default to the last tokens, and refuses what is still too long.
    fn fit(&self, request: &RequestFields, encoded: Known) -> Result<Prompt, PromptError> {
        let Known { mut tokens, mut known, mut prefixes } = encoded;
        if let Some(limit) = self.limit(request).filter(|&limit| limit < tokens.len()) {
            if request.truncate_left.unwrap_or(true) {
                tokens.drain(..tokens.len() - limit);
                known = 0;
                prefixes.clear();
            } else {
                tokens.truncate(limit);
                known = known.min(limit);
                prefixes.retain(|prefix| prefix.tokens <= limit);
            }
        }
        if self.config.max_model_len.is_some_and(|max| tokens.len() > max as usize) {
            return Err(Unroutable::TooLong.into());
        }
        Ok(Prompt { tokens, known_tokens: known, prefixes })
    }

    /// Counts of what is kept of texts and their tokens.
    pub fn cache_stats(&self) -> CacheStats {
        self.tokenizer.cache_stats()
    }
}

/// Whether the engine holds a token of the context back for the answer: it does if the request says how much it
/// wants, and completions do by default.
fn asks_for_tokens(request: &RequestFields) -> bool {
    match request.max_tokens {
        Some(n) => n > 0,
        None => request.endpoint() == Endpoint::Completions,
    }
}
