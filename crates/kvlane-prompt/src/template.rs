//! Chat templates, rendered as Python's `transformers` renders them.
//!
//! `transformers` compiles a template in Jinja's sandbox with two whitespace options, loop controls, one block tag and
//! three functions of its own; templates lean on Python's own types besides. `minijinja` is the same author's
//! engine for Rust; [`environment`] closes the gap between the two, and the goldens in `tests/` say how far it is closed.

mod detect;
mod environment;
mod methods;
mod python;
mod strftime;

use crate::chat::ChatInputs;
use crate::error::{LoadError, Unroutable};
use crate::model::{ContentFormat, PromptConfig};
use crate::tokenizer::{TokenizerConfig, read_optional};
use minijinja::{Environment, Error, Value};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// A model's chat template, compiled, and what is known of it.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    /// `bos_token` and the other special tokens, by name.
    special_tokens: Map<String, Json>,
    /// How the template wants content, found out from its source.
    pub(crate) content_format: ContentFormat,
}

/// The templates of one model: most have one, some have another for requests with tools, or named ones.
#[derive(Debug)]
pub(crate) struct ChatTemplates {
    default: Option<ChatTemplate>,
    tool_use: Option<ChatTemplate>,
}

impl ChatTemplates {
    /// Reads the templates of a model's directory; `config.chat_template` goes before all of them.
    pub(crate) fn load(
        dir: &Path,
        settings: &TokenizerConfig,
        config: &PromptConfig,
    ) -> Result<Self, LoadError> {
        let compile = |path: &Path, source: String| {
            ChatTemplate::compile(source, settings).map(Some).map_err(|e| LoadError::Malformed {
                path: path.to_path_buf(),
                problem: format!("chat template: {e:#}"),
            })
        };
        let file = dir.join("chat_template.jinja");
        let tokenizer_config = dir.join("tokenizer_config.json");
        if let Some(source) = &config.chat_template {
            return Ok(Self { default: compile(dir, source.clone())?, tool_use: None });
        }
        let additional = dir.join("additional_chat_templates/tool_use.jinja");
        let tool_use = match read_optional(&additional)? {
            Some(source) => compile(&additional, source)?,
            None => None,
        };
        if let Some(source) = read_optional(&file)? {
            return Ok(Self { default: compile(&file, source)?, tool_use });
        }
        match settings.config.get("chat_template") {
            Some(Json::String(source)) => {
                Ok(Self { default: compile(&tokenizer_config, source.clone())?, tool_use })
            }
            Some(Json::Array(named)) => {
                let source = |name: &str| {
                    named
                        .iter()
                        .find(|t| t.get("name").and_then(Json::as_str) == Some(name))
                        .and_then(|t| t.get("template")?.as_str())
                        .map(str::to_owned)
                };
                let compile = |source: Option<String>| match source {
                    Some(source) => compile(&tokenizer_config, source),
                    None => Ok(None),
                };
                Ok(Self { default: compile(source("default"))?, tool_use: compile(source("tool_use"))? })
            }
            _ => Ok(Self { default: None, tool_use }),
        }
    }

    /// The template for a request with or without tools.
    pub(crate) fn select(&self, with_tools: bool) -> Option<&ChatTemplate> {
        match &self.tool_use {
            Some(template) if with_tools => Some(template),
            _ => self.default.as_ref(),
        }
    }
}

/// Why a rendering gave no text.
#[derive(Debug)]
enum Failed {
    #[expect(dead_code, reason = "shown by failing tests alone: it may quote the conversation")]
    Template(Error),
    Request(Unroutable),
}

impl From<Error> for Failed {
    fn from(e: Error) -> Self {
        Self::Template(e)
    }
}

impl From<Unroutable> for Failed {
    fn from(e: Unroutable) -> Self {
        Self::Request(e)
    }
}

/// What marks the place where an open last message ends, as in `transformers`.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl ChatTemplate {
    fn compile(source: String, settings: &TokenizerConfig) -> Result<Self, Error> {
        let mut env = environment::new()?;
        let rewritten = environment::without_generation_tags(&source);
        let content_format = detect::content_format(&rewritten);
        env.add_template_owned("chat", rewritten)?;
        Ok(Self { env, source, special_tokens: settings.special_tokens(), content_format })
    }

    /// The template has a branch for the `developer` role.
    pub(crate) fn knows_developer(&self) -> bool {
        self.source.contains("\"developer\"") || self.source.contains("'developer'")
    }

    /// The conversation's text.
    pub(crate) fn render(&self, inputs: ChatInputs, local_unix_s: i64) -> Result<String, Unroutable> {
        // What the template engine says may quote the conversation, so it stops here.
        self.render_or_explain(inputs, local_unix_s).map_err(|failed| match failed {
            Failed::Template(_) => Unroutable::TemplateFailed,
            Failed::Request(cause) => cause,
        })
    }

    fn render_or_explain(&self, mut inputs: ChatInputs, local_unix_s: i64) -> Result<String, Failed> {
        let open =
            if inputs.continue_final_message { Some(self.mark_open_message(&mut inputs)?) } else { None };
        let mut context = self.special_tokens.clone();
        context.extend(inputs.variables);
        let mut context: Vec<(Value, Value)> =
            context.iter().map(|(name, json)| (Value::from(name.as_str()), python::value(json))).collect();
        context.push((
            Value::from("messages"),
            python::list(inputs.messages.iter().map(python::dict).collect()),
        ));
        context.push((Value::from("tools"), python::value(&inputs.tools)));
        context.push((Value::from(environment::NOW), Value::from(local_unix_s)));
        let text = self.env.get_template("chat")?.render(Value::from_pairs(context))?;
        match open {
            None => Ok(text),
            Some(last) => Ok(cut_at_tag(text, &last)?),
        }
    }

    /// Tags the last message's last text; returns that text.
    fn mark_open_message(&self, inputs: &mut ChatInputs) -> Result<String, Unroutable> {
        if !self.source.contains("content") {
            return Err(Unroutable::Rejected);
        }
        let content =
            inputs.messages.last_mut().and_then(|m| m.get_mut("content")).ok_or(Unroutable::Rejected)?;
        let text = match content {
            Json::String(text) => text,
            Json::Array(parts) => parts
                .iter_mut()
                .rev()
                .find_map(|part| match part.get_mut("text") {
                    Some(Json::String(text)) => Some(text),
                    _ => None,
                })
                .ok_or(Unroutable::Rejected)?,
            _ => return Err(Unroutable::Rejected),
        };
        let last = text.clone();
        text.push_str(CONTINUE_TAG);
        Ok(last)
    }
}

fn cut_at_tag(mut text: String, last: &str) -> Result<String, Unroutable> {
    let tag = CONTINUE_TAG.trim_end();
    let at = text.rfind(tag).ok_or(Unroutable::Rejected)?;
    if !text.contains(last.trim_matches(python::is_space)) {
        return Err(Unroutable::Rejected);
    }
    // Without the tag's own last blank the template trims its messages, so the open message is trimmed too.
    let trimmed = !text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if trimmed {
        text.truncate(text.trim_end_matches(python::is_space).len());
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
