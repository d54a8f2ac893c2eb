//! One word's bytes into tokens, pair by pair.
//!
//! The library's order decides, also where it is odd: the pair of the least rank first, of equal ones the leftmost; and a pair that has changed since it
//! was queued is still merged if what stands there now makes the same token. So this is its loop, over the same queue, without its strings.

use serde::Deserialize;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use tokenizers::models::bpe::BPE;

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mixed>>;

/// Vocabulary and merges by token ids.
#[derive(Debug)]
pub(super) struct Pairs {
    /// The token of each byte.
    bytes: Box<[u32; 256]>,
    /// Two neighbours, as `left << 32 | right`: their rank and the token that they make.
    merges: Map<u64, (u32, u32)>,
    /// Words that are tokens whatever the merges say; empty if the model does not have that rule.
    whole: HashMap<Box<[u8]>, u32>,
}

/// Working memory of [`Pairs::merge`].
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    /// Rank, place and token of each pair that may be merged, least first.
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

#[derive(Clone, Copy, Debug)]
struct Symbol {
    token: u32,
    /// [`NONE`] for the first.
    before: u32,
    /// [`NONE`] for the last.
    next: u32,
    merged_away: bool,
}

const NONE: u32 = u32::MAX;

impl Pairs {
    /// From the library's model. `None`: it merges in a way that is not done here.
    pub(super) fn of(model: &BPE) -> Option<Self> {
        #[derive(Deserialize)]
        struct Tables {
            vocab: HashMap<String, u32>,
            merges: Vec<(String, String)>,
        }
        let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if model.dropout.is_some_and(|p| p > 0.0)
            || set(&model.continuing_subword_prefix)
            || set(&model.end_of_word_suffix)
        {
            return None;
        }
        // The merges are to be had only as the model writes itself down.
        let Tables { vocab, merges } = serde_json::from_slice(&serde_json::to_vec(model).ok()?).ok()?;
        let letters = super::super::tiktoken::letters();
        let mut bytes = Box::new([0; 256]);
        for (token, letter) in bytes.iter_mut().zip(letters) {
            // Without one of them the model would have to say "unknown".
            *token = *vocab.get(letter.encode_utf8(&mut [0; 4]) as &str)?;
        }
        let mut by_pair = Map::with_capacity_and_hasher(merges.len(), BuildHasherDefault::default());
        for (rank, (left, right)) in (0..).zip(&merges) {
            let made = *vocab.get(&[left.as_str(), right].concat())?;
            by_pair.insert(pair(*vocab.get(left)?, *vocab.get(right)?), (rank, made));
        }
        let mut whole = HashMap::new();
        if model.ignore_merges {
            let of_letter: HashMap<char, u8> = letters.into_iter().zip(0..=u8::MAX).collect();
            let plain =
                |text: &str| text.chars().map(|c| of_letter.get(&c).copied()).collect::<Option<Box<[u8]>>>();
            whole = vocab.iter().filter_map(|(text, id)| Some((plain(text)?, *id))).collect();
        }
        Some(Self { bytes, merges: by_pair, whole })
    }

    /// Appends the tokens of `word` to `ids`.
    pub(super) fn merge(&self, word: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if let Some(id) = self.whole.get(word) {
            ids.push(*id);
            return;
        }
        let Scratch { symbols, queue } = scratch;
        symbols.clear();
        queue.clear();
        let last = word.len() as u32 - 1;
        symbols.extend((0..).zip(word).map(|(at, byte): (u32, _)| Symbol {
            token: self.bytes[usize::from(*byte)],
            before: at.checked_sub(1).unwrap_or(NONE),
            next: if at == last { NONE } else { at + 1 },
            merged_away: false,
        }));
        for (at, two) in (0..).zip(symbols.windows(2)) {
            if let Some((rank, made)) = self.merges.get(&pair(two[0].token, two[1].token)) {
                queue.push(Reverse((*rank, at, *made)));
            }
        }
        while let Some(Reverse((_, at, made))) = queue.pop() {
            let left = symbols[at as usize];
            if left.merged_away || left.next == NONE {
                continue;
            }
            let right = symbols[left.next as usize];
            if self.merges.get(&pair(left.token, right.token)).is_none_or(|(_, now)| *now != made) {
                continue;
            }
            symbols[left.next as usize].merged_away = true;
            symbols[at as usize] = Symbol { token: made, next: right.next, ..left };
            if left.before != NONE
                && let before = symbols[left.before as usize]
                && let Some((rank, made)) = self.merges.get(&pair(before.token, made))
            {
                queue.push(Reverse((*rank, left.before, *made)));
            }
            if right.next != NONE {
                symbols[right.next as usize].before = at;
                let next = symbols[right.next as usize];
                if let Some((rank, made)) = self.merges.get(&pair(made, next.token)) {
                    queue.push(Reverse((*rank, at, *made)));
                }
            }
        }
        ids.extend(symbols.iter().filter(|symbol| !symbol.merged_away).map(|symbol| symbol.token));
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Multiplies and folds: pairs of ids are spread well by that.
#[derive(Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }

    fn write_u64(&mut self, key: u64) {
        let wide = u128::from(key ^ 0x2545_f491_4f6c_dd1d) * 0x9e37_79b9_7f4a_7c15_u128;
        self.0 = (wide as u64) ^ (wide >> 64) as u64;
    }
}
