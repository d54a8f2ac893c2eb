//! One model's way from request to tokens.

use crate::chat;
use crate::error::{LoadError, PromptError, Unroutable};
use crate::request::{Endpoint, PromptInput, RequestFields, prompt_inputs};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// How the engines of a model are set up, as far as it changes prompts. The default is an engine's default.
#[derive(Clone, Debug, Default)]
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
}

/// One model's tokenizer and chat template. Shared by all threads.
#[derive(Debug)]
pub struct ModelPrompt {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    config: PromptConfig,
}

impl ModelPrompt {
    /// Reads a model's directory, or a `tokenizer.json` with what lies beside it.
    ///
    /// Looks for `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`; only the
    /// first must be there. Without a chat template, chats are [`Unroutable::NoTemplate`].
    pub fn load(path: &Path, config: PromptConfig) -> Result<Self, LoadError> {
        let (dir, file) = if path.is_dir() {
            (path.to_path_buf(), path.join("tokenizer.json"))
        } else {
            (path.parent().map(Path::to_path_buf).unwrap_or_default(), path.to_path_buf())
        };
        let settings = crate::tokenizer::TokenizerConfig::load(&dir)?;
        let tokenizer = Tokenizer::load(&file, &settings)?;
        let template = ChatTemplate::load(&dir, &settings, &config)?;
        Ok(Self { tokenizer, template, config })
    }

    /// The prompts of `request`, one for each element of a batch, in its order.
    ///
    /// `local_unix_s` is the time that a template's `strftime_now` prints: seconds since the epoch in the *engine's*
    /// time zone (containers run in UTC, so nearly always the plain Unix time).
    pub fn tokens(&self, request: &RequestFields, local_unix_s: i64) -> Result<Vec<Prompt>, PromptError> {
        match request.endpoint() {
            Endpoint::Other => Err(Unroutable::NoPrompt.into()),
            Endpoint::Completions => self.completion(request),
            Endpoint::Chat => {
                let text = self.render(request, local_unix_s)?;
                let special = request.add_special_tokens.unwrap_or(false);
                Ok(vec![self.tokenize(request, &text, special)?])
            }
        }
    }

    /// The text that a chat request is rendered to, before tokenization.
    pub fn render(&self, request: &RequestFields, local_unix_s: i64) -> Result<String, PromptError> {
        let template = self.template.as_ref().ok_or(Unroutable::NoTemplate)?;
        let inputs = chat::inputs(request, template, &self.config)?;
        Ok(template.render(&inputs, local_unix_s)?)
    }

    fn completion(&self, request: &RequestFields) -> Result<Vec<Prompt>, PromptError> {
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
                PromptInput::Text(text) => self.tokenize(request, &text, special),
                PromptInput::Tokens(tokens) => self.fit(request, tokens),
            })
            .collect()
    }

    fn tokenize(&self, request: &RequestFields, text: &str, special: bool) -> Result<Prompt, PromptError> {
        let tokens = self.tokenizer.encode(text, special)?;
        self.fit(request, tokens)
    }

    /// Truncates as the request asks.
    fn fit(&self, request: &RequestFields, mut tokens: Vec<u32>) -> Result<Prompt, PromptError> {
        let limit = match (request.truncate_prompt_tokens, self.config.max_model_len) {
            (None, _) => None,
            (Some(n), _) if n >= 0 => Some(usize::try_from(n).unwrap_or(usize::MAX)),
            // "As long as the model takes", one token of it held back for the answer.
            (Some(_), Some(len)) => {
                Some((len as usize).saturating_sub(usize::from(request.max_tokens != Some(0))))
            }
            (Some(_), None) => None,
        };
        if let Some(limit) = limit.filter(|&limit| limit < tokens.len()) {
            if request.truncate_left.unwrap_or(false) {
                tokens.drain(..tokens.len() - limit);
            } else {
                tokens.truncate(limit);
            }
        }
        if self.config.max_model_len.is_some_and(|max| tokens.len() > max as usize) {
            return Err(Unroutable::TooLong.into());
        }
        Ok(Prompt { tokens })
    }
}
