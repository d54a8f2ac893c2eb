//! Messages, normalised as vLLM does before it renders them.

use crate::error::{BadRequest, Expected, PromptError, Unroutable};
use crate::model::PromptConfig;
use crate::request::RequestFields;
use crate::template::{ChatTemplate, TemplateInputs};
use serde_json::{Map, Value as Json};

/// The variables that the template of `request` is rendered with.
pub(crate) fn inputs(
    request: &RequestFields,
    template: &ChatTemplate,
    config: &PromptConfig,
) -> Result<TemplateInputs, PromptError> {
    let _ = &template.source;
    if request.chat_template_json().is_some() {
        return Err(Unroutable::RequestTemplate.into());
    }
    let mut variables: Map<String, Json> = config.default_template_kwargs.clone();
    if let Some(kwargs) = object("chat_template_kwargs", request.chat_template_kwargs_json())? {
        variables.extend(kwargs);
    }
    let messages: Vec<Map<String, Json>> =
        parse("messages", Expected::Messages, request.messages_json())?.unwrap_or_default();
    let messages = messages.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
    variables.insert("messages".into(), Json::Array(messages));
    let tools: Option<Vec<Json>> = parse("tools", Expected::Objects, request.tools_json())?;
    let no_tools = config.exclude_tools_when_tool_choice_none
        && request.tool_choice_json().is_none_or(|choice| choice == "\"none\"");
    variables.insert("tools".into(), tools.filter(|_| !no_tools).map_or(Json::Null, Json::Array));
    let documents: Option<Vec<Json>> = parse("documents", Expected::Objects, request.documents_json())?;
    variables.insert("documents".into(), documents.map_or(Json::Null, Json::Array));
    variables.insert("add_generation_prompt".into(), Json::Bool(request.add_generation_prompt));
    if let Some(effort) = request.reasoning_effort_json() {
        variables.insert("reasoning_effort".into(), serde_json::from_str(effort).unwrap_or_default());
    }
    Ok(TemplateInputs { variables })
}

fn message(mut message: Map<String, Json>) -> Result<Json, PromptError> {
    if !message.get("role").is_some_and(Json::is_string) {
        return Err(BadRequest::field("messages", Expected::Messages).into());
    }
    let text = match message.remove("content") {
        Some(Json::String(text)) => text,
        Some(Json::Array(parts)) => {
            let mut texts = Vec::new();
            for part in parts {
                match part {
                    Json::String(text) => texts.push(text),
                    Json::Object(mut part) if part.get("type").and_then(Json::as_str) == Some("text") => {
                        if let Some(Json::String(text)) = part.remove("text") {
                            texts.push(text);
                        }
                    }
                    _ => return Err(Unroutable::Media.into()),
                }
            }
            texts.join("\n")
        }
        None | Some(Json::Null) => String::new(),
        Some(_) => return Err(BadRequest::field("messages", Expected::Messages).into()),
    };
    message.insert("content".into(), Json::String(text));
    Ok(Json::Object(message))
}

fn parse<T: serde::de::DeserializeOwned>(
    field: &'static str,
    expected: Expected,
    json: Option<&str>,
) -> Result<Option<T>, BadRequest> {
    json.map(|json| serde_json::from_str(json).map_err(|_| BadRequest::field(field, expected))).transpose()
}

fn object(field: &'static str, json: Option<&str>) -> Result<Option<Map<String, Json>>, BadRequest> {
    parse(field, Expected::Object, json)
}
