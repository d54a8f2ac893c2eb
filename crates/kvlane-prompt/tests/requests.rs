//! Whole requests, body to tokens, against the tokens of vLLM's own renderer.
//!
//! `goldens/requests.json` holds each body and, for each model of `models/`, what vLLM 0.32 made of it: a list of prompts, or
//! null where it answered with an error.

use bytes::Bytes;
use kvlane_prompt::{Endpoint, ModelPrompt, PromptConfig, PromptError, RequestFields};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Goldens {
    max_model_len: u32,
    requests: BTreeMap<String, Request>,
    tokens: BTreeMap<String, BTreeMap<String, Option<Vec<String>>>>,
}

#[derive(Deserialize)]
struct Request {
    endpoint: String,
    body: Box<RawValue>,
}

fn tests_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"))
}

fn tokens(model: &ModelPrompt, request: &Request) -> Result<Vec<String>, PromptError> {
    let endpoint = if request.endpoint == "chat" { Endpoint::Chat } else { Endpoint::Completions };
    let fields = RequestFields::parse(endpoint, Bytes::from(request.body.get().to_owned()))?;
    let prompts = model.tokens(&fields, 0)?;
    let text = |tokens: Vec<u32>| tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    Ok(prompts.into_iter().map(|p| text(p.tokens)).collect())
}

#[test]
fn tokens_are_the_engines() {
    let goldens = std::fs::read_to_string(tests_dir().join("goldens/requests.json")).unwrap();
    let goldens: Goldens = serde_json::from_str(&goldens).unwrap();
    let (mut equal, mut refused) = (0, 0);
    let mut wrong = Vec::new();
    for (name, expected) in &goldens.tokens {
        let config = PromptConfig { max_model_len: Some(goldens.max_model_len), ..Default::default() };
        let model = ModelPrompt::load(&tests_dir().join("models").join(name), config).unwrap();
        for (title, expected) in expected {
            match (tokens(&model, &goldens.requests[title]), expected) {
                (Ok(ours), Some(theirs)) if ours == *theirs => equal += 1,
                // What the engine refuses needs no tokens, but claiming some for it would be careless.
                (Err(_), None) => refused += 1,
                (ours, theirs) => {
                    wrong.push(format!("{name}: {title}\n  ours   {ours:?}\n  theirs {theirs:?}"));
                }
            }
        }
    }
    println!("{equal} equal, {refused} refused by both");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(equal > 300, "the goldens are there");
}
