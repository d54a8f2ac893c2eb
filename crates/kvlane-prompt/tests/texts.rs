//! Random Unicode through every tokenizer of `models/`, against the token ids of Python's `transformers`.
//!
//! `TEXTS=FILE` takes other texts than the committed ones; see `goldens/README.md`.

use bytes::Bytes;
use kvlane_prompt::{Endpoint, ModelPrompt, PromptConfig, RequestFields};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Goldens {
    seed: u64,
    texts: Vec<String>,
    /// For each model and text: the count of tokens, and a hash over their ids.
    tokens: BTreeMap<String, Vec<String>>,
}

fn summary(tokens: &[u32]) -> String {
    let text = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{} {hash:016x}", tokens.len())
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a developer's switch of this test")]
fn tokens_are_those_of_transformers() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let file = std::env::var_os("TEXTS").map_or_else(|| tests.join("goldens/texts.json"), PathBuf::from);
    let goldens: Goldens = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (name, expected) in &goldens.tokens {
        let model = ModelPrompt::load(&tests.join("models").join(name), PromptConfig::default()).unwrap();
        for (text, expected) in goldens.texts.iter().zip(expected) {
            if text.is_empty() {
                continue;
            }
            let body = serde_json::json!({"prompt": text, "add_special_tokens": false}).to_string();
            let fields = RequestFields::parse(Endpoint::Completions, Bytes::from(body)).unwrap();
            let tokens = &model.tokens(&fields, 0).unwrap()[0].tokens;
            if summary(tokens) != *expected {
                wrong.push(format!("{name}: {text:?}\n  ours {tokens:?}, expected {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "seed {}: {} differ:\n{}", goldens.seed, wrong.len(), wrong.join("\n"));
}
