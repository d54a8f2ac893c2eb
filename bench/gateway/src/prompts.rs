//! Bodies of chat requests: cold prompts, growing conversations, hot system prompts.
//!
//! Text is made of the words of this project's own documents, so that a tokenizer sees English.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use crate::engine::{ANSWER_TOKENS, ANSWER_WORD, MODEL};
use crate::load::Cell;

/// Words that make one token, on average, with a 128k vocabulary (counted over 20,000 words of this text).
const WORDS_PER_TOKEN: f64 = 0.83;
/// Turns that a conversation grows by before it goes back to its beginning and takes another way.
const TURNS: usize = 16;
/// Words of a user's turn.
const TURN_WORDS: usize = 40;
/// System prompts in use at a time.
const HOT_PROMPTS: u64 = 4;

/// Steps a counter into a well-mixed number (SplitMix64).
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What is new in each request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// All of it.
    Cold,
    /// The last turn of a conversation.
    Growing,
    /// The user's words after one of a few long system prompts.
    Hot,
}

impl Kind {
    /// In tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Growing => "growing",
            Self::Hot => "hot",
        }
    }
}

/// The words that prompts are made of.
pub struct Words(Vec<String>);

impl Words {
    /// From the documents in the project's root.
    pub fn read(root: &Path) -> Arc<Self> {
        let mut words = Vec::new();
        for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSE"] {
            let text = std::fs::read_to_string(root.join(name)).unwrap_or_default();
            let plain = |w: &&str| w.bytes().all(|b| b.is_ascii_alphabetic() || b",.;:".contains(&b));
            words.extend(text.split_whitespace().filter(plain).map(str::to_owned));
        }
        assert!(words.len() > 500, "the project's documents are in its root");
        Arc::new(Self(words))
    }

    /// Appends `count` words, chosen by `state`.
    fn text(&self, state: &mut u64, count: usize, out: &mut String) {
        for _ in 0..count {
            out.push_str(&self.0[random(state) as usize % self.0.len()]);
            out.push(' ');
        }
    }
}

/// Where the text of a run comes from.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    /// Of what the router has seen before: the same in each round of a router and cell.
    pub known: u64,
    /// Of what it has not: another each time.
    pub fresh: u64,
}

/// One client's requests.
pub struct Source {
    words: Arc<Words>,
    kind: Kind,
    prompt_words: usize,
    streams: bool,
    state: u64,
    turn: usize,
    /// The messages so far, without the closing bracket.
    messages: String,
    /// How long they were when the conversation began.
    base: usize,
}

impl Source {
    /// Client `client` of a run. What is known beforehand comes from `seeds.known`, what is new from `seeds.fresh`.
    pub fn new(words: &Arc<Words>, cell: Cell, seeds: Seeds, client: u64) -> Self {
        let Cell { tokens, kind, streams, clients: _ } = cell;
        let prompt_words = ((tokens as f64 * WORDS_PER_TOKEN) as usize).max(1);
        let mut state = seeds.fresh.wrapping_mul(0x1000_0001).wrapping_add(client);
        random(&mut state);
        let mut source = Self {
            words: Arc::clone(words),
            kind,
            prompt_words,
            streams,
            state,
            turn: 0,
            messages: String::new(),
            base: 0,
        };
        let mut text_state = match kind {
            Kind::Hot => seeds.known.wrapping_add(client % HOT_PROMPTS),
            Kind::Cold | Kind::Growing => seeds.known.wrapping_mul(0x1000_0001).wrapping_add(client),
        };
        match kind {
            Kind::Cold => {}
            Kind::Growing => source.message("user", prompt_words, &mut text_state),
            Kind::Hot => source.message("system", prompt_words, &mut text_state),
        }
        source.base = source.messages.len();
        source
    }

    fn message(&mut self, role: &str, words: usize, state: &mut u64) {
        if !self.messages.is_empty() {
            self.messages.push(',');
        }
        let _ = write!(self.messages, "{{\"role\":\"{role}\",\"content\":\"{:x} ", random(state));
        self.words.text(state, words, &mut self.messages);
        self.messages.push_str("\"}");
    }

    /// The next request: head and body.
    pub fn next(&mut self) -> Vec<u8> {
        let mut state = self.state;
        match self.kind {
            Kind::Cold => {
                self.messages.clear();
                self.message("user", self.prompt_words, &mut state);
            }
            Kind::Hot => {
                self.messages.truncate(self.base);
                self.message("user", TURN_WORDS, &mut state);
            }
            Kind::Growing => {
                if self.turn == TURNS {
                    self.turn = 0;
                    self.messages.truncate(self.base);
                }
                let answer = ANSWER_WORD.repeat(ANSWER_TOKENS);
                let _ = write!(self.messages, ",{{\"role\":\"assistant\",\"content\":\"{answer}\"}}");
                self.message("user", TURN_WORDS, &mut state);
                self.turn += 1;
            }
        }
        self.state = state;
        let body = format!(
            "{{\"model\":\"{MODEL}\",\"messages\":[{}],\"max_tokens\":{ANSWER_TOKENS},\"stream\":{}}}",
            self.messages, self.streams
        );
        let mut request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        request.push_str(&body);
        request.into_bytes()
    }
}
