//! Byte-level byte-pair tokenizers, encoded several times faster than by the library and to the same ids.
//!
//! Nearly every current model is of this family: text is cut at added tokens, then into words by a regular expression, and each word's bytes
//! are merged in pairs. The library does it through strings that remember where each of their bytes came from, which is
//! most of its cost and of no use here. This module does the same steps on plain ranges of the text:
//!
//! 1. [`Added`]: added tokens, leftmost and longest first, in the raw text and then in the normalized pieces;
//! 2. [`Splitter`]: the words, by an automaton that is built from the library's own regular expressions;
//! 3. [`Words`]: words that were seen before and are short;
//! 4. [`Pairs`]: the merges, in exactly the library's order.
//!
//! # Why it is the same
//!
//! The library stays the reference. [`ByteLevel::of`] takes a tokenizer apart and gives up on any component that is not listed there; a text that
//! needs what is not done here (an added token that strips blanks, say) goes to the library; and every tokenizer has to pass
//! [`PROBES`] at load, in both ways, before it is used. The crate's parity tests run through this module.

mod merge;
mod split;
mod words;

use aho_corasick::{AhoCorasick, MatchKind};
use merge::Pairs;
use serde_json::Value as Json;
use split::{Automaton, Splitter};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tokenizers::{AddedToken, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, Tokenizer};
use words::Words;

/// Sets of working memory that are kept; more threads at a time make their own and drop them.
const DESKS_MAX: usize = 32;

/// The words of GPT-2, which a byte-level pre-tokenizer uses unless told otherwise.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Texts that must come out the same in both ways before a tokenizer is encoded here.
const PROBES: [&str; 12] = [
    "Hello, world! It's what they'LL'Ve said: don't, I'D go.",
    "  two  blanks\t\ttabs\r\n\r\n lines \n\n\n  and ends   ",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ٣٤ Ⅷ",
    "fn main() { let x: Vec<u8> = vec![0; 42]; println!(\"{x:?}\"); } // done\n\t#include <stdio.h>",
    "na\u{ef}ve caf\u{e9} e\u{301} \u{c5}ngstr\u{f6}m \u{212b} \u{fb01} stra\u{df}e '\u{17f} K\u{212a}",
    "你好，世界。今日は良い天気ですね。한국어 텍스트 ภาษาไทย हिन्दी",
    "👋🏽 👨‍👩‍👧‍👦 🇩🇪 \u{200d}\u{fe0f} \u{2028} \u{a0}\u{3000}x \u{85} \u{feff}",
    "Привет, мир! ΑΒΓ αβγς ﬀ ŉ İi ǅ ʰ العربية שלום",
    "snake_case CamelCaseWords HTTPServer 3D x86_64 --flag=/usr/bin a/b\\c <tag attr='v'>",
    "\u{0}\u{1}\u{7f}\u{ad}\u{378}\u{e000}\u{10ffff}",
    " ",
    "\n",
];

/// A tokenizer of the family, taken apart.
#[derive(Debug)]
pub(super) struct ByteLevel {
    raw: Added,
    normalized: Added,
    /// Of pieces that are not [`is_composed`].
    normalizer: Option<NormalizerWrapper>,
    stages: Vec<Stage>,
    pairs: Pairs,
    desks: Mutex<Vec<Desk>>,
    /// See [`ByteLevel::has_seams`].
    seams: bool,
}

/// One step from a piece of text to its words.
#[derive(Debug)]
enum Stage {
    Split(Box<Splitter>),
    /// Every numeric character by itself.
    Digits,
}

/// Working memory of one encoding.
#[derive(Debug)]
struct Desk {
    /// One for each [`Stage::Split`], in order.
    automata: Vec<Automaton>,
    words: Words,
    merging: merge::Scratch,
    pieces: Vec<Range<usize>>,
    split: Vec<Range<usize>>,
}

impl ByteLevel {
    /// Takes `tokenizer` apart. `None`: it has something that is not understood, or does not pass the probes.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        let normalizer = match tokenizer.get_normalizer().map(steps).unwrap_or_default() {
            [] => None,
            [nfc @ NormalizerWrapper::NFC(_)] => Some(nfc.clone()),
            _ => return None,
        };
        let stages = stages(&serde_json::to_value(tokenizer.get_pre_tokenizer()?).ok()?)?;
        let pairs = Pairs::of(model)?;
        let added = tokenizer.get_added_tokens_decoder();
        let (normalized, raw): (Vec<_>, Vec<_>) = added.into_iter().partition(|(_, token)| token.normalized);
        // A token that is matched after normalization would be matched in its own normalized form.
        if normalizer.is_some() && !normalized.iter().all(|(_, token)| is_composed(&token.content)) {
            return None;
        }
        let (raw, normalized) = (Added::new(raw)?, Added::new(normalized)?);
        let seams = has_seams(&stages) && !raw.joins_words() && !normalized.joins_words();
        let desks = Mutex::default();
        let it = Self { raw, normalized, normalizer, stages, pairs, desks, seams };
        it.passes(tokenizer).then_some(it)
    }

    /// Whether a text can be cut between a letter of `a` to `z` and a blank with another such letter behind it: the tokens of both parts, one after the
    /// other, are those of the whole, whatever else is in them.
    ///
    /// It is proven at load. A word ends there in every text: at least one stage begins one at the blank, and none joins the letter to it. What
    /// any stage or added token finds before the cut does not look beyond it, nor the other way; and no composition of characters
    /// reaches across a blank.
    pub(super) fn has_seams(&self) -> bool {
        self.seams
    }

    fn passes(&self, tokenizer: &Tokenizer) -> bool {
        PROBES.iter().all(|text| {
            let library = tokenizer.encode_fast(*text, false);
            library.is_ok_and(|library| self.encode(text).is_some_and(|ours| ours == library.get_ids()))
        })
    }

    /// The token ids of `text`; `None`: only the library can tell.
    pub(super) fn encode(&self, text: &str) -> Option<Vec<u32>> {
        let kept = self.desks.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut desk = kept.unwrap_or_else(|| self.desk());
        let mut ids = Vec::with_capacity(text.len() / 4 + 8);
        let done = self.encode_at(&mut desk, text, &mut ids);
        let mut desks = self.desks.lock().unwrap_or_else(PoisonError::into_inner);
        if desks.len() < DESKS_MAX {
            desks.push(desk);
        }
        drop(desks);
        done.map(|()| ids)
    }

    fn desk(&self) -> Desk {
        let splitters = self.stages.iter().filter_map(|stage| match stage {
            Stage::Split(splitter) => Some(splitter.automaton()),
            Stage::Digits => None,
        });
        Desk {
            automata: splitters.collect(),
            words: Words::new(),
            merging: merge::Scratch::default(),
            pieces: Vec::new(),
            split: Vec::new(),
        }
    }

    fn encode_at(&self, desk: &mut Desk, text: &str, ids: &mut Vec<u32>) -> Option<()> {
        self.raw.cut(text, ids, |piece, ids| {
            let composed;
            let piece = match &self.normalizer {
                Some(normalizer) if !is_composed(piece) => {
                    let mut normalized = NormalizedString::from(piece);
                    normalizer.normalize(&mut normalized).ok()?;
                    composed = normalized;
                    composed.get()
                }
                _ => piece,
            };
            self.normalized.cut(piece, ids, |piece, ids| self.encode_piece(desk, piece, ids))
        })
    }

    /// A piece without added tokens.
    fn encode_piece(&self, desk: &mut Desk, piece: &str, ids: &mut Vec<u32>) -> Option<()> {
        let Desk { automata, words, merging, pieces, split } = desk;
        pieces.clear();
        pieces.push(0..piece.len());
        let mut automata = automata.iter_mut();
        for stage in &self.stages {
            split.clear();
            match stage {
                Stage::Split(splitter) => {
                    let automaton = automata.next()?;
                    for range in pieces.drain(..) {
                        splitter.split(automaton, piece.as_bytes(), range, split)?;
                    }
                }
                Stage::Digits => {
                    for range in pieces.drain(..) {
                        split::digits(piece, range, split);
                    }
                }
            }
            std::mem::swap(pieces, split);
        }
        for range in pieces.drain(..) {
            let word = &piece.as_bytes()[range];
            words.ids(word, ids, |ids| self.pairs.merge(word, merging, ids));
        }
        Some(())
    }
}

/// Whether a text is surely in composed form: no combining mark, and nothing that a canonical composition changes. Says no when in doubt.
fn is_composed(text: &str) -> bool {
    text.is_ascii()
        || text.chars().all(|c| {
            matches!(c, '\0'..='\u{2ff}' | '\u{410}'..='\u{44f}' | '\u{2010}'..='\u{2027}' | '\u{3041}'..='\u{3096}'
                | '\u{30a1}'..='\u{30fa}' | '\u{3001}'..='\u{3020}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}'
                | '\u{ff01}'..='\u{ffdc}' | '\u{1f300}'..='\u{1faff}')
        })
}

/// The steps of a normalizer. (DeepSeek's is a sequence of none.)
fn steps(normalizer: &NormalizerWrapper) -> &[NormalizerWrapper] {
    match normalizer {
        NormalizerWrapper::Sequence(steps) => steps.as_ref(),
        one => std::slice::from_ref(one),
    }
}

/// The steps of a pre-tokenizer that ends in bytes; `None` where one is not understood.
fn stages(pre_tokenizer: &Json) -> Option<Vec<Stage>> {
    let all = match pre_tokenizer.get("type")?.as_str()? {
        "Sequence" => pre_tokenizer.get("pretokenizers")?.as_array()?.as_slice(),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let (last, steps) = all.split_last()?;
    let flag = |of: &Json, name: &str| of.get(name).and_then(Json::as_bool);
    let mut stages = Vec::new();
    for step in steps {
        stages.push(match step.get("type")?.as_str()? {
            "Split" => {
                let pattern = step.get("pattern")?.get("Regex")?.as_str()?;
                let gaps = match (step.get("behavior")?.as_str()?, flag(step, "invert")?) {
                    ("Isolated", _) => true,
                    ("Removed", true) => false,
                    _ => return None,
                };
                Stage::Split(Box::new(Splitter::new(pattern, gaps)?))
            }
            "Digits" if flag(step, "individual_digits")? => Stage::Digits,
            _ => return None,
        });
    }
    if last.get("type")?.as_str()? != "ByteLevel" || flag(last, "add_prefix_space")? {
        return None;
    }
    if flag(last, "use_regex").unwrap_or(true) {
        stages.push(Stage::Split(Box::new(Splitter::new(GPT2, true)?)));
    }
    Some(stages)
}

/// Whether a word always ends between a letter and a blank with a letter behind it.
fn has_seams(stages: &[Stage]) -> bool {
    let splitters = || {
        stages.iter().filter_map(|stage| match stage {
            Stage::Split(splitter) => Some(splitter),
            Stage::Digits => None,
        })
    };
    splitters().all(|splitter| !splitter.joins_words())
        && splitters().any(|splitter| splitter.begins_at_blank(&mut splitter.automaton()))
}

/// Added tokens of one kind: those matched in raw text, or those matched after normalization.
#[derive(Debug)]
struct Added {
    finder: Option<AhoCorasick>,
    tokens: Vec<(u32, AddedToken)>,
}

impl Added {
    fn new(mut tokens: Vec<(u32, AddedToken)>) -> Option<Self> {
        tokens.retain(|(_, token)| !token.content.is_empty());
        let finder = match tokens.as_slice() {
            [] => None,
            tokens => Some(
                AhoCorasick::builder()
                    .match_kind(MatchKind::LeftmostLongest)
                    .build(tokens.iter().map(|(_, token)| &token.content))
                    .ok()?,
            ),
        };
        Some(Self { finder, tokens })
    }

    /// Whether a match may reach from a letter to a blank behind it, by itself or because it takes the blanks behind it along.
    fn joins_words(&self) -> bool {
        let joins = |pair: &[u8]| pair[0].is_ascii_lowercase() && pair[1] == b' ';
        self.tokens.iter().any(|(_, token)| {
            let text = token.content.as_bytes();
            text.windows(2).any(joins) || (token.rstrip && text.last().is_some_and(u8::is_ascii_lowercase))
        })
    }

    /// Cuts `text` at its added tokens: their ids go to `ids`, what lies between them to `piece`.
    fn cut(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        mut piece: impl FnMut(&str, &mut Vec<u32>) -> Option<()>,
    ) -> Option<()> {
        let mut from = 0;
        if let Some(finder) = &self.finder {
            for found in finder.find_iter(text) {
                let (id, token) = &self.tokens[found.pattern().as_usize()];
                // These depend on what is around them.
                if token.single_word || token.lstrip || token.rstrip {
                    return None;
                }
                if from < found.start() {
                    piece(&text[from..found.start()], ids)?;
                }
                ids.push(*id);
                from = found.end();
            }
        }
        if from < text.len() { piece(&text[from..], ids) } else { Some(()) }
    }
}

#[cfg(test)]
mod tests;
