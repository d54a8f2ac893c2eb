//! Messages, tools and variables of a chat request, normalised as vLLM 0.32 does before it renders them.
//!
//! The engine does not hand a request's JSON to the template as it is. Its request model drops and reorders fields, its
//! chat parser joins or wraps content parts, decodes tool arguments, renames reasoning, and folds roles that the template
//! does not know. Templates that print whole objects make each of these visible in the tokens, so each is done here, in
//! the same order: [`message`] for one message, then [`decode_arguments`], then [`fold_developer`].

use crate::error::{BadRequest, Expected, PromptError, Unroutable};
use crate::model::{ContentFormat, PromptConfig};
use crate::request::RequestFields;
use serde_json::value::RawValue;
use serde_json::{Map, Value as Json};

type Object = Map<String, Json>;

/// What a chat template is rendered with.
#[derive(Debug)]
pub(crate) struct ChatInputs {
    /// The conversation; each message has `role` first, then `content`.
    pub(crate) messages: Vec<Object>,
    /// `tools`, or null.
    pub(crate) tools: Json,
    /// Everything else: `documents`, `add_generation_prompt`, and the request's own variables.
    pub(crate) variables: Object,
    /// Leave the last message open instead of starting a new one.
    pub(crate) continue_final_message: bool,
}

/// The variables that `request` sets, with the operator's defaults below them.
pub(crate) fn variables(request: &RequestFields, config: &PromptConfig) -> Result<Object, PromptError> {
    let own: Option<Object> =
        parse("chat_template_kwargs", Expected::Object, request.chat_template_kwargs_json())?;
    let own = own.unwrap_or_default();
    if request.chat_template_json().is_some() || own.get("chat_template").is_some_and(|t| !t.is_null()) {
        return Err(Unroutable::RequestTemplate.into());
    }
    // Names that the engine passes itself; a second value for one of them is an error there.
    if ["messages", "conversation", "chat_template"].iter().any(|name| own.contains_key(*name)) {
        return Err(Unroutable::Rejected.into());
    }
    let names_thinking = own.contains_key("enable_thinking");
    let mut variables = config.default_template_kwargs.clone();
    merge(&mut variables, own);
    let mut named = Object::new();
    named.insert("add_generation_prompt".into(), Json::Bool(request.add_generation_prompt));
    named.insert("continue_final_message".into(), Json::Bool(request.continue_final_message));
    if let Some(documents) = parse("documents", Expected::Objects, request.documents_json())? {
        named.insert("documents".into(), documents);
    }
    if let Some(effort) = request.reasoning_effort_json() {
        let effort: String = parse("reasoning_effort", Expected::String, Some(effort))?.unwrap_or_default();
        if !names_thinking {
            named.insert("enable_thinking".into(), Json::Bool(effort != "none"));
        }
        named.insert("reasoning_effort".into(), Json::String(effort));
    }
    merge(&mut variables, named);
    let is_document = |d: &Json| d.is_object();
    match variables.get("documents") {
        None => {}
        Some(Json::Array(documents)) if documents.iter().all(is_document) => {}
        Some(_) => return Err(Unroutable::Rejected.into()),
    }
    Ok(variables)
}

/// Later values win, except that `null` and `"auto"` mean "not given".
fn merge(variables: &mut Object, later: Object) {
    variables
        .extend(later.into_iter().filter(|(_, value)| !value.is_null() && value.as_str() != Some("auto")));
}

/// The template's `tools`, or null: from the request, else from its variables.
pub(crate) fn tools(
    request: &RequestFields,
    config: &PromptConfig,
    variables: &mut Object,
) -> Result<Json, PromptError> {
    let given: Option<Vec<Object>> = parse("tools", Expected::Objects, request.tools_json())?;
    let own = variables.remove("tools");
    let chosen_none = request.tool_choice_json() == Some("\"none\"");
    match (own, given) {
        (Some(own), _) => Ok(own),
        (None, Some(tools)) if tools.is_empty() => Err(Unroutable::Rejected.into()),
        (None, Some(tools)) if !(chosen_none && config.exclude_tools_when_tool_choice_none) => {
            tools.into_iter().map(tool).collect::<Result<Vec<_>, _>>().map(Json::Array)
        }
        (None, _) => Ok(Json::Null),
    }
}

/// One tool as the engine's request model writes it out again: its own order, unknown fields dropped, absent ones null.
fn tool(mut given: Object) -> Result<Json, PromptError> {
    let Some(Json::Object(mut function)) = given.remove("function") else {
        return Err(Unroutable::Rejected.into());
    };
    let defer = given.remove("defer_loading").filter(|v| !v.is_null());
    let mut out = Object::new();
    out.insert("name".into(), function.shift_remove("name").ok_or(Unroutable::Rejected)?);
    out.insert("description".into(), function.shift_remove("description").unwrap_or_default());
    out.insert("parameters".into(), function.shift_remove("parameters").unwrap_or_default());
    for (name, value) in [
        ("strict", function.shift_remove("strict")),
        (
            "defer_loading",
            function.shift_remove("defer_loading").filter(|v| !v.is_null()).or_else(|| defer.clone()),
        ),
    ] {
        if let Some(value) = value.filter(|v| !v.is_null()) {
            out.insert(name.into(), value);
        }
    }
    let mut tool = Object::new();
    tool.insert("type".into(), Json::String("function".into()));
    tool.insert("function".into(), Json::Object(out));
    if let Some(defer) = defer {
        tool.insert("defer_loading".into(), defer);
    }
    Ok(Json::Object(tool))
}

/// The conversation as the template sees it.
pub(crate) fn messages(
    request: &RequestFields,
    format: ContentFormat,
    knows_developer: bool,
) -> Result<Vec<Object>, PromptError> {
    let given: Vec<Object> =
        parse("messages", Expected::Messages, request.messages_json())?.unwrap_or_default();
    let mut conversation = given.into_iter().map(|m| message(m, format)).collect::<Result<Vec<_>, _>>()?;
    for message in &mut conversation {
        decode_arguments(message)?;
    }
    if !knows_developer && conversation.iter().any(|m| role(m) == "developer") {
        conversation = fold_developer(conversation);
    }
    Ok(conversation)
}

/// Whether any of these messages holds more than text. What cannot be read does not.
pub(crate) fn has_media(messages_json: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Message<'a> {
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
    }
    #[derive(serde::Deserialize)]
    struct Part {
        #[serde(default)]
        r#type: Json,
        #[serde(default)]
        uuid: Json,
    }
    let messages: Vec<Message<'_>> = serde_json::from_str(messages_json).unwrap_or_default();
    messages
        .iter()
        .filter_map(|message| message.content)
        .filter(|content| content.get().starts_with('['))
        .any(|content| {
            let parts: Vec<Json> = serde_json::from_str(content.get()).unwrap_or_default();
            parts.into_iter().filter(Json::is_object).any(|part| {
                serde_json::from_value::<Part>(part).is_ok_and(|part| {
                    !part.uuid.is_null()
                        || !part.r#type.as_str().is_some_and(|kind| TEXT_PARTS.contains(&kind))
                })
            })
        })
}

/// Kinds of content parts that are text.
const TEXT_PARTS: [&str; 6] = ["text", "input_text", "output_text", "refusal", "thinking", "tool_reference"];

fn role(message: &Object) -> &str {
    message.get("role").and_then(Json::as_str).unwrap_or_default()
}

fn message(mut given: Object, format: ContentFormat) -> Result<Object, PromptError> {
    let Some(Json::String(role)) = given.remove("role") else {
        return Err(BadRequest::field("messages", Expected::Messages).into());
    };
    let mut parts = match given.remove("content") {
        None | Some(Json::Null) => Vec::new(),
        Some(Json::Array(parts)) => parts,
        Some(Json::String(text)) => vec![text_part(text)],
        Some(_) => return Err(Unroutable::Rejected.into()),
    };
    if role == "system" {
        parts = parts.into_iter().filter_map(without_billing_header).collect();
    }
    let content = content(parts, format)?;
    let reasoning = match (given.remove("reasoning"), given.remove("reasoning_content")) {
        (None | Some(Json::Null), given) => given,
        (given, _) => given,
    };
    let mut out = Object::new();
    out.insert("role".into(), Json::String(role.clone()));
    out.insert("content".into(), content);
    match role.as_str() {
        "assistant" => {
            match given.remove("tool_calls") {
                None | Some(Json::Null) => {}
                Some(Json::Array(calls)) => {
                    out.insert("tool_calls".into(), calls.into_iter().map(tool_call).collect());
                }
                Some(_) => return Err(Unroutable::Rejected.into()),
            }
            if let Some(reasoning) = reasoning.filter(|r| !r.is_null()) {
                out.insert("reasoning".into(), reasoning.clone());
                out.insert("reasoning_content".into(), reasoning);
            }
        }
        "tool" => {
            if let Some(id) = given.remove("tool_call_id") {
                out.insert("tool_call_id".into(), id);
            }
            join_texts(out.get_mut("content").expect("inserted above"));
        }
        _ => {}
    }
    for name in ["name", "task"] {
        if let Some(Json::String(text)) = given.remove(name) {
            out.insert(name.into(), Json::String(text));
        }
    }
    if role == "developer" {
        out.insert("tools".into(), given.remove("tools").unwrap_or_default());
    }
    Ok(out)
}

fn text_part(text: String) -> Json {
    let mut part = Object::new();
    part.insert("type".into(), Json::String("text".into()));
    part.insert("text".into(), Json::String(text));
    Json::Object(part)
}

/// The engine drops the line by which one client marks each of its system prompts with a changing value.
fn without_billing_header(part: Json) -> Option<Json> {
    const HEADER: &str = "x-anthropic-billing-header";
    let text = match &part {
        Json::String(text) => text,
        Json::Object(o) if o.get("type").and_then(Json::as_str) == Some("text") => o.get("text")?.as_str()?,
        _ => return Some(part),
    };
    if !text.starts_with(HEADER) {
        return Some(part);
    }
    let rest = text.split_once('\n').map(|(_, rest)| rest.to_owned()).filter(|rest| !rest.is_empty())?;
    Some(match part {
        Json::Object(mut o) => {
            o.insert("text".into(), Json::String(rest));
            Json::Object(o)
        }
        _ => Json::String(rest),
    })
}

/// Field names that some content part has by its type; anything else in a text part is passed on.
const PART_FIELDS: [&str; 18] = [
    "audio_embeds",
    "audio_url",
    "closed",
    "data",
    "file",
    "image_embeds",
    "image_pil",
    "image_url",
    "input_audio",
    "name",
    "prompt_cache_breakpoint",
    "refusal",
    "text",
    "thinking",
    "type",
    "uuid",
    "video_embeds",
    "video_url",
];

fn content(parts: Vec<Json>, format: ContentFormat) -> Result<Json, PromptError> {
    let mut texts = Vec::new();
    let mut wrapped = Vec::new();
    for part in parts {
        let (kind, text, rest) = match part {
            Json::String(text) => ("text", text, Object::new()),
            Json::Object(mut part) => {
                let kind = part.shift_remove("type");
                if part.contains_key("uuid") && !part["uuid"].is_null() {
                    return Err(Unroutable::Media.into());
                }
                let (kind, field) = match kind.as_ref().and_then(Json::as_str) {
                    Some(kind @ ("text" | "input_text" | "output_text")) => (kind, "text"),
                    Some("refusal") => ("refusal", "refusal"),
                    Some("thinking") => ("thinking", "thinking"),
                    Some("tool_reference") => ("tool_reference", "name"),
                    _ => return Err(Unroutable::Media.into()),
                };
                let kind = if kind == "tool_reference" || kind == "text" || kind == "refusal" {
                    kind.to_owned()
                } else {
                    String::from("other")
                };
                match part.shift_remove(field) {
                    Some(Json::String(text)) => match kind.as_str() {
                        "tool_reference" => ("tool_reference", text, Object::new()),
                        _ => {
                            part.retain(|name, _| !PART_FIELDS.contains(&name.as_str()));
                            ("text", text, part)
                        }
                    },
                    None | Some(Json::Null) if kind == "text" || kind == "refusal" => continue,
                    _ => return Err(Unroutable::Rejected.into()),
                }
            }
            _ => return Err(Unroutable::Rejected.into()),
        };
        match format {
            ContentFormat::String => texts.push(text),
            ContentFormat::Parts if kind == "tool_reference" => {
                let mut part = Object::new();
                part.insert("type".into(), Json::String(kind.into()));
                part.insert("name".into(), Json::String(text));
                wrapped.push(Json::Object(part));
            }
            ContentFormat::Parts => {
                let Json::Object(mut part) = text_part(text) else { unreachable!("text_part makes objects") };
                part.extend(rest);
                wrapped.push(Json::Object(part));
            }
        }
    }
    Ok(match format {
        ContentFormat::String => Json::String(texts.join("\n")),
        ContentFormat::Parts => Json::Array(wrapped),
    })
}

/// A tool's answer is text to nearly every template: parts become one string if all of them are text.
fn join_texts(content: &mut Json) {
    let Json::Array(parts) = content else { return };
    if parts.iter().all(|p| p.get("type").and_then(Json::as_str) == Some("text")) {
        let texts: Vec<&str> = parts.iter().filter_map(|p| p.get("text").and_then(Json::as_str)).collect();
        *content = Json::String(texts.join("\n"));
    }
}

/// The engine's request model puts the fields it knows first, in its own order.
fn tool_call(call: Json) -> Json {
    let Json::Object(call) = call else { return call };
    let mut call = ordered(call, &["id", "function", "type"]);
    if let Some(Json::Object(function)) = call.get_mut("function") {
        *function = ordered(std::mem::take(function), &["arguments", "name"]);
    }
    Json::Object(call)
}

fn ordered(mut object: Object, first: &[&str]) -> Object {
    let mut out = Object::new();
    for name in first {
        if let Some(value) = object.shift_remove(*name) {
            out.insert((*name).into(), value);
        }
    }
    out.extend(object);
    out
}

/// Templates expect the arguments of a tool call as an object; the API has them as a string of JSON.
fn decode_arguments(message: &mut Object) -> Result<(), PromptError> {
    if role(message) != "assistant" {
        return Ok(());
    }
    let Some(Json::Array(calls)) = message.get_mut("tool_calls") else { return Ok(()) };
    if calls.is_empty() {
        message.shift_remove("tool_calls");
        return Ok(());
    }
    for call in calls {
        let Json::Object(call) = call else { return Err(Unroutable::Rejected.into()) };
        if call.get("type").is_some_and(|t| t.as_str() != Some("function")) {
            return Err(Unroutable::Rejected.into());
        }
        let Some(Json::Object(function)) = call.get_mut("function") else {
            return Err(Unroutable::Rejected.into());
        };
        let decoded = match function.get("arguments") {
            Some(Json::Object(arguments)) => Some(arguments.clone()),
            Some(Json::String(text)) => serde_json::from_str(text).ok(),
            _ => None,
        };
        function.insert("arguments".into(), Json::Object(decoded.unwrap_or_default()));
    }
    Ok(())
}

/// For a template that does not know `developer`: such messages become `system`, and all system messages one, at the
/// front.
fn fold_developer(conversation: Vec<Object>) -> Vec<Object> {
    let mut systems = Vec::new();
    let mut others = Vec::new();
    let mut folded = Vec::new();
    let mut scattered = false;
    for (i, mut message) in conversation.into_iter().enumerate() {
        if role(&message) == "developer" {
            message.insert("role".into(), Json::String("system".into()));
            message.shift_remove("tools");
        }
        if role(&message) == "system" {
            scattered |= i > 0 || !systems.is_empty();
            let text = match message.get("content") {
                Some(Json::String(text)) => text.clone(),
                Some(Json::Array(parts)) => {
                    let texts: Vec<&str> =
                        parts.iter().filter_map(|p| p.get("text").and_then(Json::as_str)).collect();
                    texts.join("\n")
                }
                _ => String::new(),
            };
            if !text.is_empty() {
                systems.push(text);
            }
        } else {
            others.push(message.clone());
        }
        folded.push(message);
    }
    if !scattered {
        return folded;
    }
    let mut merged = Object::new();
    merged.insert("role".into(), Json::String("system".into()));
    merged.insert("content".into(), Json::String(systems.join("\n\n")));
    let mut out = vec![merged];
    out.extend(others);
    out
}

fn parse<T: serde::de::DeserializeOwned>(
    field: &'static str,
    expected: Expected,
    json: Option<&str>,
) -> Result<Option<T>, BadRequest> {
    json.map(|json| serde_json::from_str(json).map_err(|_| BadRequest::field(field, expected))).transpose()
}
