//! CPU time that a chat request costs from body to tokens: known, new, and beside it what the library `tokenizers` takes for the same text.
//!
//! Usage: `cost MODEL_DIR TEXT_FILE`. The text is cut into messages of a conversation of about 8,000 and of about 100,000
//! tokens; see BENCHMARKS.md for models, machine and results.

#![expect(clippy::print_stdout, clippy::panic, reason = "a command-line tool")]

use bytes::Bytes;
use cpu_time::ThreadTime;
use kvlane_prompt::{Endpoint, ModelPrompt, PromptConfig, RequestFields};
use std::path::Path;

/// A conversation of messages of some 2,000 bytes each; `turn` makes each conversation unlike the others from the start.
fn body(text: &str, turn: usize, bytes: usize) -> Bytes {
    let mut messages =
        vec![serde_json::json!({"role": "system", "content": format!("Conversation {turn}.")})];
    let mut rest = &text[..bytes];
    while !rest.is_empty() {
        let mut end = rest.len().min(2000);
        while !rest.is_char_boundary(end) {
            end += 1;
        }
        let role = if messages.len() % 2 == 1 { "user" } else { "assistant" };
        messages.push(serde_json::json!({"role": role, "content": &rest[..end]}));
        rest = &rest[end..];
    }
    Bytes::from(serde_json::json!({"model": "m", "messages": messages}).to_string())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, text] = arguments.as_slice() else { panic!("usage: cost MODEL_DIR TEXT_FILE") };
    let load = |cache_bytes| {
        let config = PromptConfig { cache_bytes, ..Default::default() };
        ModelPrompt::load(Path::new(model), config).expect("a model's directory")
    };
    let (without, with) = (load(0), load(256 << 20));
    let library = Path::new(model).join("tokenizer.json");
    let library = tokenizers::Tokenizer::from_file(library).expect("a tokenizer.json");
    let mut text = std::fs::read_to_string(text).expect("a text file");
    while text.len() < 500_000 {
        text.push_str(&text.clone());
    }
    for bytes in [200, 36_000, 450_000] {
        let bytes = (bytes..).find(|&b| text.is_char_boundary(b)).expect("the text is longer");
        let rounds = if bytes < 1000 { 200 } else { 10 };
        let (mut parse, mut cold, mut known, mut theirs, mut tokens) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), 0);
        for turn in 0..rounds {
            let body = body(&text, turn, bytes);
            let start = ThreadTime::now();
            let fields = RequestFields::parse(Endpoint::Chat, body).expect("a valid body");
            parse.push(start.elapsed());
            for (model, times) in [(&without, &mut cold), (&with, &mut known)] {
                // The text's first time warms the cache of the one that has it.
                model.tokens(&fields, 0).expect("a prompt");
                let start = ThreadTime::now();
                tokens = model.tokens(&fields, 0).expect("a prompt")[0].tokens.len();
                times.push(start.elapsed());
            }
            let rendered = with.render(&fields, 0).expect("a text");
            let start = ThreadTime::now();
            let found = library.encode_fast(rendered.as_str(), false).expect("tokens").get_ids().len();
            theirs.push(start.elapsed());
            assert_eq!(found, tokens, "the library finds as many");
        }
        let median = |v: &mut Vec<std::time::Duration>| {
            v.sort_unstable();
            v[v.len() / 2].as_secs_f64() * 1e6
        };
        let (parse, cold, known) = (median(&mut parse), median(&mut cold), median(&mut known));
        let theirs = median(&mut theirs);
        println!(
            "{tokens:>7} tokens, {bytes:>6} bytes: parse {parse:.0} us, render and tokenize {cold:.0} us, known {known:.0} us; tokenizing by the library alone {theirs:.0} us; parse and cold : parse and known {:.1}, library : known {:.1}",
            (parse + cold) / (parse + known),
            theirs / known
        );
    }
}
