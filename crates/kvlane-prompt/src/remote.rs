//! Tokens from the engine's own `/tokenize`, for a model without tokenizer files on this side.
//!
//! One request body for each text of a batch; token ids need none. The caller sends them, bounded and cached, and hands
//! the answers back in order.

use crate::error::{BadRequest, PromptError, Unroutable};
use crate::request::{Endpoint, PromptInput, RequestFields, prompt_inputs};
use serde_json::{Map, Value as Json, json, value::RawValue};

/// How one prompt of a request becomes known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RemotePrompt {
    /// The request brought the token ids.
    Tokens(Vec<u32>),
    /// Post this JSON body to the engine's `/tokenize`, then [`parse_tokenize_response`].
    Ask(Vec<u8>),
}

/// What to ask the engine for each prompt of `request`, in the order of its batch.
pub fn tokenize_bodies(request: &RequestFields) -> Result<Vec<RemotePrompt>, PromptError> {
    match request.endpoint() {
        Endpoint::Other => Err(Unroutable::NoPrompt.into()),
        Endpoint::Completions => {
            if request.has_prompt_embeds() {
                return Err(Unroutable::PromptEmbeds.into());
            }
            if request.has_suffix() {
                return Err(Unroutable::Suffix.into());
            }
            let Some(prompt) = request.prompt_json() else { return Err(Unroutable::NoPrompt.into()) };
            Ok(prompt_inputs(prompt)?
                .into_iter()
                .map(|input| match input {
                    PromptInput::Tokens(tokens) => RemotePrompt::Tokens(tokens),
                    PromptInput::Text(text) => {
                        let mut body = json!({ "prompt": text });
                        add_common(request, body.as_object_mut().expect("written as an object above"));
                        RemotePrompt::Ask(body.to_string().into_bytes())
                    }
                })
                .collect())
        }
        Endpoint::Chat => chat_body(request).map(|body| vec![RemotePrompt::Ask(body)]),
    }
}

fn add_common(request: &RequestFields, body: &mut Map<String, Json>) {
    if let Some(model) = &request.model {
        body.insert("model".into(), Json::String(model.clone()));
    }
    if let Some(special) = request.add_special_tokens {
        body.insert("add_special_tokens".into(), Json::Bool(special));
    }
}

/// The chat's own fields, copied as they stand; what `/tokenize` does not know by name goes in as template variables,
/// where the chat endpoint puts it too.
fn chat_body(request: &RequestFields) -> Result<Vec<u8>, PromptError> {
    if request.chat_template_json().is_some() {
        return Err(Unroutable::RequestTemplate.into());
    }
    // `/tokenize` gives one token for an item that the model gets many for.
    if request.messages_json().is_some_and(crate::chat::has_media) {
        return Err(Unroutable::Media.into());
    }
    let raw = |json: &str| -> Result<Box<RawValue>, PromptError> {
        RawValue::from_string(json.to_owned()).map_err(|e| BadRequest::malformed(&e).into())
    };
    let mut kwargs: Map<String, Json> = match request.chat_template_kwargs_json() {
        None => Map::new(),
        Some(json) => serde_json::from_str(json)
            .map_err(|_| BadRequest::field("chat_template_kwargs", crate::Expected::Object))?,
    };
    for (name, json) in
        [("documents", request.documents_json()), ("reasoning_effort", request.reasoning_effort_json())]
    {
        if let Some(json) = json {
            kwargs.insert(name.into(), serde_json::from_str(json).map_err(|e| BadRequest::malformed(&e))?);
        }
    }
    if let Some(effort) = kwargs.get("reasoning_effort").and_then(Json::as_str) {
        let thinking = effort != "none";
        kwargs.entry("enable_thinking").or_insert(Json::Bool(thinking));
    }
    let mut body: Map<String, Json> = Map::new();
    add_common(request, &mut body);
    body.insert("add_generation_prompt".into(), Json::Bool(request.add_generation_prompt));
    body.insert("continue_final_message".into(), Json::Bool(request.continue_final_message));
    if !kwargs.is_empty() {
        body.insert("chat_template_kwargs".into(), Json::Object(kwargs));
    }
    // The long fields are spliced in as text: no decoding, no second encoding.
    let mut out = Json::Object(body).to_string();
    out.pop();
    for (name, json) in [("messages", request.messages_json()), ("tools", request.tools_json())] {
        if let Some(json) = json {
            out.push_str(",\"");
            out.push_str(name);
            out.push_str("\":");
            out.push_str(raw(json)?.get());
        }
    }
    out.push('}');
    Ok(out.into_bytes())
}

/// An engine's answer to `/tokenize` that cannot be used; treat the engine as one without `/tokenize`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadTokenizeResponse;

impl std::fmt::Display for BadTokenizeResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the engine's answer to /tokenize has no list of token ids named `tokens`")
    }
}

impl std::error::Error for BadTokenizeResponse {}

/// The token ids in an engine's answer to `/tokenize`.
pub fn parse_tokenize_response(body: &[u8]) -> Result<Vec<u32>, BadTokenizeResponse> {
    #[derive(serde::Deserialize)]
    struct Response {
        tokens: Vec<u32>,
    }
    serde_json::from_slice::<Response>(body).map(|r| r.tokens).map_err(|_| BadTokenizeResponse)
}
