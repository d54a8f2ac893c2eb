//! The few fields of a request body that routing needs.
//!
//! The gateway forwards the original bytes, so this looks only at what decides where a request should go. Long
//! fields (messages, prompts, tools) stay where they are in the body: a [`RequestFields`] remembers their place and
//! shares the body's buffer, so that parsing costs one pass and no copy, and the result can move to another thread.
//! They are decoded by whoever needs the prompt; a cache-blind policy never does.
//!
//! Values are read as leniently as the engines read them (pydantic's lax mode): a router must not refuse what its
//! engine takes. Unknown fields are skipped; of a repeated field the last one counts, as in Python's `json`.

use crate::error::{BadRequest, Expected};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ops::Range;

/// What the path of a request promises about its body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// `/v1/chat/completions`: `messages`.
    Chat,
    /// `/v1/completions`: `prompt`.
    Completions,
    /// Anything else with a JSON body (embeddings, scores, reranking, …): has no prompt that can be routed by.
    Other,
}

/// A request body and what routing needs of it. Cheap to clone; holds the body's buffer.
#[derive(Clone, Debug)]
pub struct RequestFields {
    body: Bytes,
    endpoint: Endpoint,
    /// The model or adapter asked for; `None` = the engine's only one.
    pub model: Option<String>,
    /// The answer is to be streamed.
    pub stream: bool,
    /// The stream's last chunk is to report usage (`stream_options.include_usage`).
    pub include_usage: bool,
    /// Most tokens to generate, as asked for (`max_completion_tokens` before `max_tokens`); `None` = up to the model.
    pub max_tokens: Option<u64>,
    /// Answers to generate for each prompt, at least 1.
    pub n: u32,
    /// Separates this request's cache from others'; `None` or empty = none.
    pub cache_salt: Option<String>,
    /// The caller's name for the conversation, if it gave one.
    pub session_id: Option<String>,
    /// The prompt is repeated in the answer.
    pub echo: bool,
    /// The engine computes the whole prompt and reads nothing from its cache, because probabilities of the prompt's own tokens are asked for.
    pub skips_cache: bool,
    pub(crate) truncate_prompt_tokens: Option<i64>,
    pub(crate) truncate_left: Option<bool>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) continue_final_message: bool,
    spans: Spans,
}

/// Where in the body the long fields are.
#[derive(Clone, Debug, Default)]
struct Spans {
    prompt: Option<Range<usize>>,
    messages: Option<Range<usize>>,
    tools: Option<Range<usize>>,
    tool_choice: Option<Range<usize>>,
    documents: Option<Range<usize>>,
    chat_template: Option<Range<usize>>,
    chat_template_kwargs: Option<Range<usize>>,
    reasoning_effort: Option<Range<usize>>,
    prompt_embeds: Option<Range<usize>>,
    suffix: Option<Range<usize>>,
}

impl RequestFields {
    /// Reads `body`, which arrived at `endpoint`.
    ///
    /// Cost: one pass over the body. Errors name the field and what was expected, never what was sent.
    pub fn parse(endpoint: Endpoint, body: Bytes) -> Result<Self, BadRequest> {
        let text =
            std::str::from_utf8(&body).map_err(|e| BadRequest::NotUtf8 { at_byte: e.valid_up_to() })?;
        let wire: Wire<'_> = serde_json::from_str(text).map_err(|e| BadRequest::malformed(&e))?;
        let span = |field: &Option<&RawValue>| {
            field.map(|raw| {
                let start = raw.get().as_ptr() as usize - text.as_ptr() as usize;
                start..start + raw.get().len()
            })
        };
        let spans = Spans {
            prompt: span(&wire.prompt),
            messages: span(&wire.messages),
            tools: span(&wire.tools),
            tool_choice: span(&wire.tool_choice),
            documents: span(&wire.documents),
            chat_template: span(&wire.chat_template),
            chat_template_kwargs: span(&wire.chat_template_kwargs),
            reasoning_effort: span(&wire.reasoning_effort),
            prompt_embeds: span(&wire.prompt_embeds),
            suffix: span(&wire.suffix),
        };
        let missing = |field, expected| Err(BadRequest::field(field, expected));
        match endpoint {
            Endpoint::Chat => match wire.messages.map(|m| m.get().starts_with('[')) {
                Some(true) => {}
                _ => return missing("messages", Expected::Messages),
            },
            Endpoint::Completions => {
                if wire.prompt.is_none() && wire.prompt_embeds.is_none() {
                    return missing("prompt", Expected::Prompt);
                }
            }
            Endpoint::Other => {}
        }
        let echo = boolean("echo", wire.echo)?.unwrap_or(false);
        // vLLM takes the answer's setting for the prompt's when the prompt is echoed; a chat has one even if it does not say so.
        let echoes_logprobs = echo && (endpoint == Endpoint::Chat || wire.logprobs.is_some());
        let max_tokens = match integer("max_completion_tokens", wire.max_completion_tokens)? {
            Some(n) => Some(n),
            None => integer("max_tokens", wire.max_tokens)?,
        };
        Ok(Self {
            endpoint,
            model: string("model", wire.model)?,
            stream: boolean("stream", wire.stream)?.unwrap_or(false),
            include_usage: include_usage(wire.stream_options)?,
            max_tokens: max_tokens.and_then(|n| u64::try_from(n).ok()),
            n: integer("n", wire.n)?.map_or(1, |n| u32::try_from(n.max(1)).unwrap_or(u32::MAX)),
            cache_salt: string("cache_salt", wire.cache_salt)?,
            session_id: string("session_id", wire.session_id)?,
            echo,
            skips_cache: wire.prompt_logprobs.is_some() || echoes_logprobs,
            truncate_prompt_tokens: integer("truncate_prompt_tokens", wire.truncate_prompt_tokens)?,
            truncate_left: match string("truncation_side", wire.truncation_side)?.as_deref() {
                None => None,
                Some("left") => Some(true),
                Some("right") => Some(false),
                Some(_) => return missing("truncation_side", Expected::Side),
            },
            add_special_tokens: boolean("add_special_tokens", wire.add_special_tokens)?,
            add_generation_prompt: boolean("add_generation_prompt", wire.add_generation_prompt)?
                .unwrap_or(true),
            continue_final_message: boolean("continue_final_message", wire.continue_final_message)?
                .unwrap_or(false),
            spans,
            body,
        })
    }

    /// The body as it came in, for forwarding.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// Where the request arrived.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    fn raw(&self, span: &Option<Range<usize>>) -> Option<&str> {
        let bytes = &self.body[span.clone()?];
        Some(
            std::str::from_utf8(bytes)
                .expect("the whole body was valid UTF-8 and a span ends at JSON punctuation"),
        )
    }

    pub(crate) fn prompt_json(&self) -> Option<&str> {
        self.raw(&self.spans.prompt)
    }

    /// The body once for each prompt of a batch, with that prompt alone; empty if the prompt is not a batch.
    ///
    /// Cost: a copy of the body's other fields for each.
    pub fn prompt_bodies(&self) -> Result<Vec<Bytes>, BadRequest> {
        let (Some(span), Some(json)) = (&self.spans.prompt, self.prompt_json()) else {
            return Ok(Vec::new());
        };
        if !json.starts_with('[') || serde_json::from_str::<Vec<u32>>(json).is_ok() {
            return Ok(Vec::new());
        }
        let items: Vec<&RawValue> =
            serde_json::from_str(json).map_err(|_| BadRequest::field("prompt", Expected::Prompt))?;
        let (before, after) = (&self.body[..span.start], &self.body[span.end..]);
        Ok(items.into_iter().map(|item| [before, item.get().as_bytes(), after].concat().into()).collect())
    }

    pub(crate) fn messages_json(&self) -> Option<&str> {
        self.raw(&self.spans.messages)
    }

    pub(crate) fn tools_json(&self) -> Option<&str> {
        self.raw(&self.spans.tools)
    }

    pub(crate) fn tool_choice_json(&self) -> Option<&str> {
        self.raw(&self.spans.tool_choice)
    }

    pub(crate) fn documents_json(&self) -> Option<&str> {
        self.raw(&self.spans.documents)
    }

    pub(crate) fn chat_template_json(&self) -> Option<&str> {
        self.raw(&self.spans.chat_template)
    }

    pub(crate) fn chat_template_kwargs_json(&self) -> Option<&str> {
        self.raw(&self.spans.chat_template_kwargs)
    }

    pub(crate) fn reasoning_effort_json(&self) -> Option<&str> {
        self.raw(&self.spans.reasoning_effort)
    }

    pub(crate) fn has_prompt_embeds(&self) -> bool {
        self.spans.prompt_embeds.is_some()
    }

    pub(crate) fn has_suffix(&self) -> bool {
        self.spans.suffix.is_some()
    }
}

/// The prompt of a completions request, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum PromptInput<'a> {
    Text(Cow<'a, str>),
    Tokens(Vec<u32>),
}

/// Decodes `prompt`: a text, token ids, or a batch of either. An empty batch has no prompts.
pub(crate) fn prompt_inputs(json: &str) -> Result<Vec<PromptInput<'_>>, BadRequest> {
    let wrong = || BadRequest::field("prompt", Expected::Prompt);
    if let Some(text) = decode_string(json) {
        return Ok(vec![PromptInput::Text(text)]);
    }
    if let Ok(tokens) = serde_json::from_str::<Vec<u32>>(json) {
        // `[]` is an empty list of token ids to the engine, whose type list tries that first.
        return Ok(vec![PromptInput::Tokens(tokens)]);
    }
    let items: Vec<&RawValue> = serde_json::from_str(json).map_err(|_| wrong())?;
    items
        .into_iter()
        .map(|item| match decode_string(item.get()) {
            Some(text) => Ok(PromptInput::Text(text)),
            None => serde_json::from_str(item.get()).map(PromptInput::Tokens).map_err(|_| wrong()),
        })
        .collect()
}

/// A JSON string, borrowed where it holds no escapes. `None` = something else.
fn decode_string(json: &str) -> Option<Cow<'_, str>> {
    struct Text<'a>(Cow<'a, str>);
    impl<'de> Deserialize<'de> for Text<'de> {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            struct V;
            impl<'de> Visitor<'de> for V {
                type Value = Text<'de>;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a string")
                }
                fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Self::Value, E> {
                    Ok(Text(Cow::Borrowed(v)))
                }
                fn visit_str<E>(self, v: &str) -> Result<Self::Value, E> {
                    Ok(Text(Cow::Owned(v.to_owned())))
                }
            }
            d.deserialize_str(V)
        }
    }
    if !json.starts_with('"') {
        return None;
    }
    serde_json::from_str::<Text<'_>>(json).ok().map(|t| t.0)
}

fn string(field: &'static str, raw: Option<&RawValue>) -> Result<Option<String>, BadRequest> {
    match raw.map(RawValue::get) {
        None => Ok(None),
        Some(json) => match decode_string(json) {
            Some(text) => Ok(Some(text.into_owned())),
            None => Err(BadRequest::field(field, Expected::String)),
        },
    }
}

/// `true`, `false`, and what pydantic's lax mode takes for them.
fn boolean(field: &'static str, raw: Option<&RawValue>) -> Result<Option<bool>, BadRequest> {
    let Some(json) = raw.map(RawValue::get) else { return Ok(None) };
    let word = json.trim_matches('"').to_ascii_lowercase();
    match word.as_str() {
        "true" | "1" | "1.0" => Ok(Some(true)),
        "false" | "0" | "0.0" => Ok(Some(false)),
        "t" | "y" | "yes" | "on" if json.starts_with('"') => Ok(Some(true)),
        "f" | "n" | "no" | "off" if json.starts_with('"') => Ok(Some(false)),
        _ => Err(BadRequest::field(field, Expected::Boolean)),
    }
}

/// An integer, or what pydantic's lax mode takes for one: `16.0`, `"16"`. Booleans count as 0 and 1 there too.
fn integer(field: &'static str, raw: Option<&RawValue>) -> Result<Option<i64>, BadRequest> {
    let Some(json) = raw.map(RawValue::get) else { return Ok(None) };
    let digits = json.trim_matches('"').trim();
    if let Ok(n) = digits.parse::<i64>() {
        return Ok(Some(n));
    }
    match digits.parse::<f64>() {
        Ok(x) if x.fract() == 0.0 && x.abs() < 9e15 => Ok(Some(x as i64)),
        _ if json == "true" => Ok(Some(1)),
        _ if json == "false" => Ok(Some(0)),
        _ => Err(BadRequest::field(field, Expected::Integer)),
    }
}

fn include_usage(raw: Option<&RawValue>) -> Result<bool, BadRequest> {
    #[derive(Deserialize)]
    struct StreamOptions<'a> {
        #[serde(borrow, default)]
        include_usage: Option<&'a RawValue>,
    }
    let Some(raw) = raw else { return Ok(false) };
    let options: StreamOptions<'_> =
        serde_json::from_str(raw.get()).map_err(|_| BadRequest::field("stream_options", Expected::Object))?;
    Ok(boolean("stream_options.include_usage", non_null(options.include_usage))?.unwrap_or(false))
}

fn non_null(raw: Option<&RawValue>) -> Option<&RawValue> {
    raw.filter(|raw| raw.get() != "null")
}

macro_rules! wire {
    ($($field:ident: $key:ident),* $(,)?) => {
        /// Each field as it stands in the body; an explicit `null` is the same as absence.
        #[derive(Default)]
        struct Wire<'a> { $($field: Option<&'a RawValue>,)* }

        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Key { $($key,)* #[serde(other)] Other }

        impl<'de> Deserialize<'de> for Wire<'de> {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct V;
                impl<'de> Visitor<'de> for V {
                    type Value = Wire<'de>;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a JSON object")
                    }
                    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                        let mut wire = Wire::default();
                        while let Some(key) = map.next_key::<Key>()? {
                            match key {
                                $(Key::$key => wire.$field = non_null(Some(map.next_value()?)),)*
                                Key::Other => { map.next_value::<IgnoredAny>()?; }
                            }
                        }
                        Ok(wire)
                    }
                }
                d.deserialize_map(V)
            }
        }
    };
}

wire! {
    model: Model,
    stream: Stream,
    stream_options: StreamOptions,
    max_tokens: MaxTokens,
    max_completion_tokens: MaxCompletionTokens,
    n: N,
    cache_salt: CacheSalt,
    session_id: SessionId,
    echo: Echo,
    logprobs: Logprobs,
    prompt_logprobs: PromptLogprobs,
    truncate_prompt_tokens: TruncatePromptTokens,
    truncation_side: TruncationSide,
    add_special_tokens: AddSpecialTokens,
    add_generation_prompt: AddGenerationPrompt,
    continue_final_message: ContinueFinalMessage,
    prompt: Prompt,
    messages: Messages,
    tools: Tools,
    tool_choice: ToolChoice,
    documents: Documents,
    chat_template: ChatTemplate,
    chat_template_kwargs: ChatTemplateKwargs,
    reasoning_effort: ReasoningEffort,
    prompt_embeds: PromptEmbeds,
    suffix: Suffix,
}

#[cfg(test)]
mod tests;
