//! With the cache = without it, whatever was tokenized before.

use super::random::Random;
use super::*;
use crate::tokenizer::{Tokenizer, TokenizerConfig};
use std::path::Path;

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
            // Seams as often as there is room for them, or as they come.
            let mut cuts = tokenizer.cuts().clone();
            if seed % 2 == 0 {
                cuts.seam_bytes = cuts.seam_bytes.map(|_| 20);
            }
            // Small enough for evictions, so that every mix of known and unknown segments comes up.
            let cache = PrefixCache::new(SHARDS * 3000);
            let mut texts = vec![String::new()];
            let mut named: HashMap<u128, Vec<u32>> = HashMap::new();
            for step in 0..60 {
                let from = texts[random.below(texts.len())].clone();
                let text = match random.below(4) {
                    0 => from,
                    1 => edit(&mut random, &from),
                    _ => from + &message(&mut random) + random.pick(&MARKS),
                };
                let before: &[u32] = if random.below(3) == 0 { &[1] } else { &[] };
                let ours = cache
                    .tokens(&cuts, &text, before, usize::MAX, |text| tokenizer.encode_content(text))
                    .unwrap()
                    .unwrap();
                let fresh = [before, &tokenizer.encode_by_library(&text).unwrap()].concat();
                assert_eq!(ours.tokens, fresh, "{name}, seed {seed}, step {step}: {text:?}");
                assert!(ours.known <= fresh.len());
                for prefix in &ours.prefixes {
                    let tokens = named.entry(prefix.id).or_insert_with(|| fresh[..prefix.tokens].to_vec());
                    assert_eq!(
                        *tokens,
                        fresh[..prefix.tokens],
                        "{name}, seed {seed}, step {step}: one name for two"
                    );
                }
                assert_eq!(ours.prefixes.last().map_or(before.len(), |last| last.tokens), fresh.len());
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
    let mut seen = Vec::new();
    for turn in 0..50 {
        text.push_str(&format!(
            "<|im_start|>user\nthis is what was said in turn {turn}, at some length<|im_end|>\n"
        ));
        let Known { known, prefixes, .. } = cache
            .tokens(tokenizer.cuts(), &text, &[], usize::MAX, |text| {
                tokenized += text.len();
                tokenizer.encode_content(text)
            })
            .unwrap()
            .unwrap();
        assert_eq!(known > 0, turn > 0);
        let same = prefixes.iter().filter(|prefix| seen.contains(&prefix.id)).count();
        assert!(
            turn == 0 || same + 2 >= prefixes.len(),
            "turn {turn}: {same} of {} have their name",
            prefixes.len()
        );
        seen.extend(prefixes.iter().map(|prefix| prefix.id));
    }
    assert!(tokenized < 2 * text.len(), "{tokenized} bytes tokenized for a conversation of {}", text.len());
    let stats = cache.stats();
    assert!(stats.hit_bytes > 20 * stats.miss_bytes / 2 && stats.evicted == 0, "{stats:?}");
}

#[test]
fn a_growing_text_without_special_tokens_costs_its_new_text() {
    let (_, tokenizer) = tokenizers().into_iter().find(|(name, _)| name == "gpt2-like").unwrap();
    let cache = PrefixCache::new(1 << 20);
    let (mut text, mut random) = (String::new(), Random(1));
    let mut tokenized = 0;
    for _ in 0..40 {
        for _ in 0..300 {
            text.push_str(random.pick(&[
                "so ",
                "they said",
                " it was",
                " all\n",
                "good ",
                "and",
                " 1999, ",
                "naïve ",
            ]));
        }
        cache
            .tokens(tokenizer.cuts(), &text, &[], usize::MAX, |text| {
                tokenized += text.len();
                tokenizer.encode_content(text)
            })
            .unwrap()
            .unwrap();
    }
    // What is new, and behind the last seam what was new before.
    assert!(
        tokenized < text.len() + 40 * (SEAM_BYTES + 500),
        "{tokenized} bytes tokenized for {}",
        text.len()
    );
}

#[test]
fn whoever_may_not_wait_gets_what_is_known() {
    let (_, tokenizer) = tokenizers().into_iter().find(|(name, _)| name == "gpt2-like").unwrap();
    let cache = PrefixCache::new(1 << 20);
    let old = format!("{}<|im_end|>", "what was said before ".repeat(200));
    let text = format!("{old}{}<|im_end|>", "and what is new ".repeat(20));
    let within = |bytes| {
        cache.tokens(tokenizer.cuts(), &text, &[], bytes, |text| tokenizer.encode_content(text)).unwrap()
    };
    assert!(within(0).is_none() && cache.stats().miss_bytes == 0);
    let tries = (1..).find(|_| within(3000).is_some()).unwrap();
    assert_eq!((tries, cache.stats().miss_bytes), (2, text.len() as u64), "nothing is tokenized twice");
    let known = within(0).unwrap();
    assert!(known.tokens == tokenizer.encode_content(&text).unwrap(), "all is known");
    assert_eq!(known.known, known.tokens.len());
}

#[test]
fn the_bound_holds_and_what_is_used_stays() {
    let (_, tokenizer) = tokenizers().into_iter().find(|(name, _)| name == "gpt2-like").unwrap();
    let bytes = SHARDS * 4000;
    let cache = PrefixCache::new(bytes);
    let hot = format!("{}<|im_end|>", "the system prompt of everybody ".repeat(10));
    for i in 0..3000 {
        let text = format!("{hot}{} message number {i}<|im_end|>", "words ".repeat(20));
        let Known { known, .. } = cache
            .tokens(tokenizer.cuts(), &text, &[], usize::MAX, |text| tokenizer.encode_content(text))
            .unwrap()
            .unwrap();
        assert!(i == 0 || known > 0, "the hot segment was dropped at {i}");
        assert!(cache.stats().bytes <= bytes as u64);
    }
    assert!(cache.stats().evicted > 1000);
    // Longer than what a shard takes: tokenized each time, kept never.
    let long = "X ".repeat(4000);
    cache.tokens(tokenizer.cuts(), &long, &[], usize::MAX, |text| tokenizer.encode_content(text)).unwrap();
    assert!(cache.stats().bytes <= bytes as u64);
}
