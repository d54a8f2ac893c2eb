//! Byte-level encoding = the library's, for every model of `tests/models` and any text.

use super::*;
use crate::prefix_cache::random::Random;
use crate::tokenizer::{Tokenizer, TokenizerConfig};
use std::path::Path;

/// Those of `tests/models` that are of the family; the others go through the library.
const UNDERSTOOD: [&str; 6] =
    ["deepseek-like", "gpt2-like", "llama3-like", "o200k-like", "qwen-like", "tiktoken-like"];

fn load(name: &str) -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name);
    let file =
        ["tokenizer.json", "tiktoken.model"].map(|file| dir.join(file)).into_iter().find(|f| f.exists());
    Tokenizer::load(&file.unwrap(), &TokenizerConfig::load(&dir).unwrap(), 0).unwrap()
}

/// Characters that tokenizers tell apart, and some from anywhere.
fn character(random: &mut Random) -> char {
    const LIKELY: [&str; 8] = [
        "abcdefghij STLDMRVstldmrv'",
        "      \t\n\r\u{a0}\u{2028}\u{3000}\u{85}",
        "0123456789½Ⅷ٣",
        ".,;:!?-_/\\()[]{}<>|\"'`~@#$%^&*+=",
        "éßſŉﬁǅʰΑαБбİıÅ\u{212a}\u{212b}",
        "你好世界日本ひらカタ한국ก",
        "e\u{301}\u{308}a\u{30a}\u{93f}\u{fe0f}\u{200d}👋🏽🇩",
        "\u{0}\u{7f}\u{ad}\u{378}\u{e000}\u{feff}\u{10ffff}",
    ];
    if random.below(12) == 0 {
        return char::from_u32(random.below(0x11_0000) as u32).unwrap_or('x');
    }
    let from: Vec<char> = LIKELY[random.below(LIKELY.len())].chars().collect();
    from[random.below(from.len())]
}

fn text(random: &mut Random, marks: &[String]) -> String {
    let mut out = String::new();
    for _ in 0..random.below(12) {
        match random.below(9) {
            0 => out.push_str(&marks[random.below(marks.len())]),
            1 => out.push_str(&" ".repeat(random.below(5))),
            2 => out.push_str(&"ab".repeat(random.below(40))),
            3 => out.push_str(random.pick(&["don't", "WE'LL", "it'ſ", " 1234567", "\r\n\r\n", "HTTPServer"])),
            _ => {
                let kind = random.below(3);
                for _ in 0..1 + random.below(10) {
                    let c =
                        if kind == 0 { (b'a' + random.below(26) as u8) as char } else { character(random) };
                    out.push(c);
                }
            }
        }
    }
    out
}

#[test]
fn the_family_is_understood() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models");
    let mut names: Vec<String> = std::fs::read_dir(models)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| load(name).byte_level.is_some())
        .collect();
    names.sort();
    assert_eq!(names, UNDERSTOOD);
}

#[test]
fn any_text_gets_the_librarys_tokens() {
    for name in UNDERSTOOD {
        let tokenizer = load(name);
        let fast = tokenizer.byte_level.as_ref().unwrap();
        let mut marks: Vec<String> =
            tokenizer.inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        marks.sort();
        marks.push("<|im_".into());
        // A text with one of these is left to the library, which is what `encode` then says.
        let strips = |token: &AddedToken| token.single_word || token.lstrip || token.rstrip;
        let left: Vec<String> = tokenizer
            .inner
            .get_added_tokens_decoder()
            .into_values()
            .filter(strips)
            .map(|token| token.content)
            .collect();
        for seed in 0..1500 {
            let mut random = Random(seed);
            let text = text(&mut random, &marks);
            match fast.encode(&text) {
                None => {
                    assert!(left.iter().any(|token| text.contains(token)), "{name}, seed {seed}: {text:?}");
                }
                Some(ours) => {
                    let library = tokenizer.encode_by_library(&text).unwrap();
                    assert_eq!(ours, library, "{name}, seed {seed}: {text:?}");
                }
            }
        }
    }
}

#[test]
fn both_sides_of_a_seam_have_the_tokens_of_the_whole() {
    for name in UNDERSTOOD {
        let tokenizer = load(name);
        let fast = tokenizer.byte_level.as_ref().unwrap();
        assert!(fast.has_seams(), "{name}");
        let mut marks: Vec<String> =
            tokenizer.inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        marks.sort();
        for seed in 0..1500 {
            let mut random = Random(seed);
            let mut side = || text(&mut random, &marks);
            let (left, right) = (side() + "s", " t".to_owned() + &side());
            let parts = [&left, &right].map(|text| tokenizer.encode_content(text).unwrap()).concat();
            let whole = tokenizer.encode_by_library(&[left.as_str(), &right].concat()).unwrap();
            assert_eq!(parts, whole, "{name}, seed {seed}: {left:?} {right:?}");
        }
    }
}

#[test]
fn expressions_that_join_words_have_no_seams() {
    let seams = |pattern: &str| {
        let splitter = Splitter::new(pattern, true).unwrap();
        (!splitter.joins_words(), splitter.begins_at_blank(&mut splitter.automaton()))
    };
    for (pattern, expected) in [
        (GPT2, (true, true)),
        (r"\p{N}{1,3}", (true, false)),
        (r"\p{L}+|\s+", (true, true)),
        (r"\p{L}+", (true, false)),
        (r" ?\p{L}+ ?", (false, true)),
        (r"[a-z ]+", (false, true)),
        (r"(?:ab c)+| \p{L}+", (false, true)),
        (r"the (?:end)?| \p{L}+|\p{L}+", (false, true)),
    ] {
        assert_eq!(seams(pattern), expected, "{pattern}");
    }
}

#[test]
fn every_character_gets_the_librarys_tokens() {
    for name in UNDERSTOOD {
        let tokenizer = load(name);
        let fast = tokenizer.byte_level.as_ref().unwrap();
        for around in [" ", "'"] {
            for from in (0..0x11_0000).step_by(512) {
                let text: String = (from..from + 512)
                    .filter_map(char::from_u32)
                    .flat_map(|c| [around, c.encode_utf8(&mut [0; 4])].concat().chars().collect::<Vec<_>>())
                    .collect();
                // One character in 40 blocks is enough beyond the planes in use.
                if from >= 0x2_0000 && from % 0x1_0000 != 0 {
                    continue;
                }
                let ours = fast.encode(&text).unwrap();
                assert!(
                    ours == tokenizer.encode_by_library(&text).unwrap(),
                    "{name}, around {around:?}, from {from:#x}"
                );
            }
        }
    }
}

#[test]
fn what_is_not_understood_is_refused() {
    for pattern in
        ["a++", "a?+", "a+?", r"\bword", "^a", "a.", "(?i:ss)", "(?=a)b", "(?!a)b", "a*", "(", r"\X"]
    {
        assert!(Splitter::new(pattern, true).is_none(), "{pattern}");
    }
}

#[test]
fn two_ways_to_one_token_are_merged_as_the_library_does() {
    // "abc" comes from a+bc and from ab+c: an entry of the queue that has gone stale is still good for the other.
    let letters = crate::tokenizer::tiktoken::letters();
    let mut vocab: Vec<String> = letters.iter().map(char::to_string).collect();
    vocab.extend(["ab", "bc", "abc", "cd", "abcd", "bcd", "aa", "aaa"].map(str::to_owned));
    let orders: [&[(&str, &str)]; 3] = [
        &[("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c"), ("c", "d"), ("a", "a"), ("aa", "a")],
        &[
            ("a", "b"),
            ("c", "d"),
            ("ab", "cd"),
            ("ab", "c"),
            ("a", "bc"),
            ("b", "c"),
            ("a", "aa"),
            ("a", "a"),
        ],
        &[
            ("ab", "c"),
            ("a", "bc"),
            ("b", "cd"),
            ("a", "bcd"),
            ("abc", "d"),
            ("a", "b"),
            ("b", "c"),
            ("c", "d"),
        ],
    ];
    for merges in orders {
        let vocab: serde_json::Map<_, _> = vocab.iter().cloned().zip((0..).map(Json::from)).collect();
        let json = serde_json::json!({"version": "1.0", "added_tokens": [],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
        let library: tokenizers::Tokenizer = serde_json::from_value(json).unwrap();
        let fast = ByteLevel::of(&library).unwrap();
        for seed in 0..3000 {
            let mut random = Random(seed);
            let word: String = (0..1 + random.below(9)).map(|_| random.pick(&["a", "b", "c", "d"])).collect();
            assert_eq!(
                fast.encode(&word).unwrap(),
                library.encode_fast(&*word, false).unwrap().get_ids(),
                "{word}"
            );
        }
    }
}
