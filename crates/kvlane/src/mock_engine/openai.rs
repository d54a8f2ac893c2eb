//! The parts of OpenAI requests that the mock looks at; everything else is ignored, as engines ignore what they do not know.

use super::error::Refusal;
use super::tokenizer::Message;
use serde::Deserialize;
use serde_json::Value;

/// What chats and completions have in common.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Common {
    pub(super) model: Option<String>,
    pub(super) max_tokens: Option<i64>,
    pub(super) min_tokens: u32,
    pub(super) n: Option<u32>,
    pub(super) seed: Option<u64>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) ignore_eos: bool,
    pub(super) return_token_ids: Option<bool>,
    pub(super) cache_salt: Option<String>,
    pub(super) kv_transfer_params: Option<Value>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    pub(super) continuous_usage_stats: Option<bool>,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct Chat {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) max_completion_tokens: Option<i64>,
    #[serde(default = "yes")]
    pub(super) add_generation_prompt: bool,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// One message of a chat.
#[derive(Debug, Deserialize)]
pub(super) struct ChatMessage {
    role: String,
    #[serde(default)]
    content: Value,
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct Completion {
    pub(super) prompt: Prompts,
    #[serde(default)]
    pub(super) echo: bool,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// One prompt or several, as text or as token ids.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// `POST /tokenize`: a chat or a prompt.
#[derive(Debug, Deserialize)]
pub(super) struct Tokenize {
    pub(super) messages: Option<Vec<ChatMessage>>,
    pub(super) prompt: Option<String>,
    #[serde(default = "yes")]
    pub(super) add_generation_prompt: bool,
    #[serde(default)]
    pub(super) return_token_strs: bool,
}

/// `POST /detokenize`.
#[derive(Debug, Deserialize)]
pub(super) struct Detokenize {
    pub(super) tokens: Vec<u32>,
}

fn yes() -> bool {
    true
}

/// Messages with their content as text: parts joined by newlines, as engines do for templates that take strings.
pub(super) fn flatten(messages: &[ChatMessage]) -> Result<Vec<Message>, Refusal> {
    if messages.is_empty() {
        return Err(Refusal::bad(
            None,
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        ));
    }
    messages.iter().map(|m| Ok(Message { role: m.role.clone(), content: text_of(&m.content)? })).collect()
}

fn text_of(content: &Value) -> Result<String, Refusal> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let texts: Option<Vec<&str>> = parts
                .iter()
                .map(|part| part.as_str().or_else(|| part.get("text").and_then(Value::as_str)))
                .collect();
            texts.map(|texts| texts.join("\n")).ok_or_else(|| {
                Refusal::bad(Some("messages"), "this model takes text only: drop other content parts")
            })
        }
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            Err(Refusal::bad(Some("messages"), "message content must be a string or a list of parts"))
        }
    }
}
