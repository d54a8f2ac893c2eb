//! Chat templates, rendered as Python's `transformers` renders them.

use crate::error::{LoadError, Unroutable};
use crate::model::PromptConfig;
use crate::tokenizer::{TokenizerConfig, read_optional};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// What a template is rendered with.
pub(crate) struct TemplateInputs {
    /// `messages`, `tools`, `documents`, `add_generation_prompt` and the per-request variables.
    pub(crate) variables: Map<String, Json>,
}

#[derive(Debug)]
pub(crate) struct ChatTemplate {
    env: Environment<'static>,
    pub(crate) source: String,
}

impl ChatTemplate {
    /// The model's chat template, or `None` if it has none.
    pub(crate) fn load(
        dir: &Path,
        settings: &TokenizerConfig,
        config: &PromptConfig,
    ) -> Result<Option<Self>, LoadError> {
        let path = dir.join("chat_template.jinja");
        let source = match (&config.chat_template, read_optional(&path)?) {
            (Some(source), _) => Some(source.clone()),
            (None, Some(source)) => Some(source),
            (None, None) => settings.config.get("chat_template").and_then(Json::as_str).map(str::to_owned),
        };
        source
            .map(|source| {
                Self::compile(source, settings).map_err(|e| LoadError::Malformed {
                    path: dir.to_path_buf(),
                    problem: format!("chat template: {e}"),
                })
            })
            .transpose()
    }

    fn compile(source: String, settings: &TokenizerConfig) -> Result<Self, Error> {
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        for name in
            ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"]
        {
            let value = settings.special_tokens.get(name).or_else(|| settings.config.get(name));
            let text = match value {
                Some(Json::String(s)) => Some(s.as_str()),
                Some(Json::Object(o)) => o.get("content").and_then(Json::as_str),
                _ => None,
            };
            if let Some(text) = text {
                env.add_global(name, text);
            }
        }
        env.add_template_owned("chat", source.clone())?;
        Ok(Self { env, source })
    }

    pub(crate) fn render(&self, inputs: &TemplateInputs, _local_unix_s: i64) -> Result<String, Unroutable> {
        let template = self.env.get_template("chat").map_err(|_| Unroutable::TemplateFailed)?;
        template.render(map(&inputs.variables)).map_err(|_| Unroutable::TemplateFailed)
    }
}

fn map(object: &Map<String, Json>) -> Value {
    Value::from_pairs(object.iter().map(|(name, json)| (name.as_str(), value(json))))
}

fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => {
                Value::from(n.as_f64().expect("a JSON number without arbitrary precision is i64, u64 or f64"))
            }
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(object) => map(object),
    }
}
