//! With the cache = without it, whatever was tokenized before.

use super::*;
use crate::tokenizer::{Tokenizer, TokenizerConfig};
use std::path::Path;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }
}

fn tokenizers() -> Vec<(String, Tokenizer)> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models");
    let mut names: Vec<_> = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
        .into_iter()
        .map(|dir| {
            let settings = TokenizerConfig::load(&dir).unwrap();
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            let file =
                ["tokenizer.json", "tiktoken.model"].map(|f| dir.join(f)).into_iter().find(|f| f.exists());
            (name, Tokenizer::load(&file.unwrap(), &settings, 0).unwrap())
        })
        .collect()
}

const WORDS: [&str; 24] = [
    "hello",
    " world",
    "  ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "don't",
    " 1234567",
    ".",
    "é",
    "e\u{301}",
    "数据",
    "🙂",
    "▁",
    "A",
    " the system",
    "token",
    " token ",
    "tokens",
    "Folded",
    "ſ",
    "\u{a0}",
    "a long run of quite ordinary words in a row",
];
const MARKS: [&str; 22] = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin|>",
    "<tool_call>",
    "<｜User｜>",
    "<left>",
    "<right>",
    "<both>",
    "<|im_",
    "<|im_start",
    "|>",
    "<unk>",
    "<pad>",
    "token",
    "  ",
    "<|",
];

fn message(random: &mut Random) -> String {
    let mut out = String::new();
    for _ in 0..1 + random.below(25) {
        out.push_str(if random.below(6) == 0 { random.pick(&MARKS) } else { random.pick(&WORDS) });
    }
    out
}

/// Changes a text somewhere: the cuts after it must not go wrong.
fn edit(random: &mut Random, text: &str) -> String {
    let place = |random: &mut Random| {
        let mut at = random.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let (a, b) = (place(random), place(random));
    let (a, b) = (a.min(b), a.max(b));
    match random.below(3) {
        0 => format!("{}{}", &text[..a], &text[b..]),
        1 => format!("{}{}{}", &text[..a], message(random), &text[a..]),
        _ => text[..b].to_owned(),
    }
}

#[test]
fn with_the_cache_as_without() {
    for (name, tokenizer) in tokenizers() {
        for seed in 0..6 {
            let mut random = Random(seed);
            // Small enough for evictions, so that every mix of known and unknown segments comes up.
            let cache = PrefixCache::new(SHARDS * 3000);
            let mut texts = vec![String::new()];
            for step in 0..60 {
                let from = texts[random.below(texts.len())].clone();
                let text = match random.below(4) {
                    0 => from,
                    1 => edit(&mut random, &from),
                    _ => from + &message(&mut random) + random.pick(&MARKS),
                };
                let (ours, known) =
                    cache.tokens(tokenizer.cuts(), &text, |text| tokenizer.encode_content(text)).unwrap();
                let fresh = tokenizer.encode_content(&text).unwrap();
                assert_eq!(ours, fresh, "{name}, seed {seed}, step {step}: {text:?}");
                assert!(known <= ours.len());
                texts.push(text);
            }
        }
    }
}

#[test]
fn a_growing_conversation_costs_its_new_text() {
    let (_, tokenizer) = tokenizers().into_iter().find(|(name, _)| name == "gpt2-like").unwrap();
    let cache = PrefixCache::new(1 << 20);
    let mut text = String::new();
    let mut tokenized = 0;
    for turn in 0..50 {
        text.push_str(&format!(
            "<|im_start|>user\nthis is what was said in turn {turn}, at some length<|im_end|>\n"
        ));
        let (_, known) = cache
            .tokens(tokenizer.cuts(), &text, |text| {
                tokenized += text.len();
                tokenizer.encode_content(text)
            })
            .unwrap();
        assert_eq!(known > 0, turn > 0);
    }
    assert!(tokenized < 2 * text.len(), "{tokenized} bytes tokenized for a conversation of {}", text.len());
    let stats = cache.stats();
    assert!(stats.hit_bytes > 20 * stats.miss_bytes / 2 && stats.evicted == 0, "{stats:?}");
}

#[test]
fn the_bound_holds_and_what_is_used_stays() {
    let (_, tokenizer) = tokenizers().into_iter().find(|(name, _)| name == "gpt2-like").unwrap();
    let bytes = SHARDS * 4000;
    let cache = PrefixCache::new(bytes);
    let hot = format!("{}<|im_end|>", "the system prompt of everybody ".repeat(10));
    for i in 0..3000 {
        let text = format!("{hot}{} message number {i}<|im_end|>", "words ".repeat(20));
        let (_, known) =
            cache.tokens(tokenizer.cuts(), &text, |text| tokenizer.encode_content(text)).unwrap();
        assert!(i == 0 || known > 0, "the hot segment was dropped at {i}");
        assert!(cache.stats().bytes <= bytes as u64);
    }
    assert!(cache.stats().evicted > 1000);
    // Longer than what a shard takes: tokenized each time, kept never.
    let long = "x ".repeat(4000);
    cache.tokens(tokenizer.cuts(), &long, |text| tokenizer.encode_content(text)).unwrap();
    assert!(cache.stats().bytes <= bytes as u64);
}
