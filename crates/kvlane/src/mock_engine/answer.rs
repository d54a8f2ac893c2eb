//! What the mock says: words made up from the prompt, the same ones each time.
//!
//! Determinism matters more than sense: a repeated request gets the same answer, so an answer that a client sends back in its
//! next turn is found in the cache, and a test can compare two runs.

use super::tokenizer::MESSAGE_END;

const WORDS: [&str; 32] = [
    "the", "block", "holds", "a", "prefix", "and", "router", "finds", "it", "where", "cache", "is", "warm",
    "so", "each", "token", "comes", "early", "while", "others", "wait", "for", "room", "in", "queue",
    "until", "step", "ends", "then", "more", "work", "begins",
];

/// Shortest and longest answer that ends by itself, in tokens.
const OWN_LENGTH: std::ops::Range<u64> = 64..320;

/// What a request allows an answer to be.
pub(super) struct Limits {
    /// Most tokens; at least 1.
    pub(super) max_tokens: u32,
    /// Fewest tokens before it may end by itself.
    pub(super) min_tokens: u32,
    /// Go on to `max_tokens` whatever comes.
    pub(super) ignore_end: bool,
}

/// An answer and why it ended: `true` = by itself, with [`MESSAGE_END`] as its last token.
pub(super) fn answer(prompt: &[u32], variant: u64, limits: &Limits) -> (Vec<u32>, bool) {
    let mut seed = variant;
    for token in prompt {
        seed = (seed ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }
    let own = (OWN_LENGTH.start + mix(seed) % (OWN_LENGTH.end - OWN_LENGTH.start)) as u32;
    let own = own.max(limits.min_tokens);
    let ends = !limits.ignore_end && own <= limits.max_tokens;
    let length = if ends { own } else { limits.max_tokens } as usize;
    let mut tokens = Vec::with_capacity(length + 8);
    let mut word = 0;
    while tokens.len() < length {
        word += 1;
        let choice = mix(seed.wrapping_add(word)) % WORDS.len() as u64;
        if word > 1 {
            tokens.push(u32::from(b' '));
        }
        tokens.extend(WORDS[choice as usize].bytes().map(u32::from));
    }
    tokens.truncate(length);
    if ends {
        tokens[length - 1] = MESSAGE_END;
    }
    (tokens, ends)
}

/// SplitMix64's finalizer.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_kept() {
        let limits = |max_tokens, min_tokens, ignore_end| Limits { max_tokens, min_tokens, ignore_end };
        let (short, ends) = answer(&[1, 2], 0, &limits(7, 0, false));
        assert_eq!((short.len(), ends), (7, false));
        let (own, ends) = answer(&[1, 2], 0, &limits(10_000, 0, false));
        assert!(ends && own.last() == Some(&MESSAGE_END) && own.len() < 320);
        let (long, ends) = answer(&[1, 2], 0, &limits(1_000, 0, true));
        assert_eq!((long.len(), ends), (1_000, false));
        assert_eq!(answer(&[1, 2], 0, &limits(10_000, 500, false)).0.len(), 500);
        assert_ne!(answer(&[1, 2], 1, &limits(7, 0, true)), answer(&[3, 2], 1, &limits(7, 0, true)));
    }
}
