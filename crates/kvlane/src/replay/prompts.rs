//! Prompts that share what the trace says they share: equal block ids become equal tokens (or words), everything else differs.
//!
//! A trace has no content, so some is made up: each id seeds a generator for its block, and what lies behind the last whole block is the
//! request's own. As text a token becomes a short common word, which is about one token of any vocabulary; as ids the lengths are exact.

use bytes::Bytes;
use kvlane_sim::trace::{Trace, TraceRequest};
use serde_json::{Value, json};

/// What prompts are sent as.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Form {
    /// Token ids to /v1/completions: lengths are exact, no tokenizer is needed.
    Completions,
    /// Text to /v1/chat/completions: lengths are about right.
    Chat,
    /// Likewise, a letter for each token: lengths are right where tokens are bytes, as those of `kvlane mock-engine`.
    Letters,
}

impl Form {
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat | Self::Letters => "/v1/chat/completions",
        }
    }
}

/// How prompts are made.
#[derive(Clone, Debug)]
pub(crate) struct Maker {
    pub(crate) form: Form,
    pub(crate) model: String,
    /// Token ids are below this.
    pub(crate) vocabulary: u32,
    pub(crate) seed: u64,
    /// Longest answer asked for.
    pub(crate) max_output: u32,
    /// Asks for the whole length of the recorded answer.
    pub(crate) ignore_eos: bool,
}

/// The lowest ids of vocabularies are special tokens.
const LOWEST_TOKEN: u32 = 1_000;

/// Each about one token of the usual vocabularies.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not",
    "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one",
    "you", "were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who",
    "will", "no", "more", "if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them",
    "can", "only", "other", "time", "new", "some",
];

impl Maker {
    /// The body of a request of `trace`; `number` is its place there.
    pub(crate) fn body(&self, trace: &Trace, request: &TraceRequest, number: usize) -> Bytes {
        let blocks = trace.blocks(request);
        let whole = blocks.len() * trace.block_tokens as usize;
        let mut tokens = Vec::with_capacity(request.input_tokens as usize);
        for id in blocks {
            let mut dice = Dice::new(self.seed, u64::from(*id));
            tokens.extend((0..trace.block_tokens).map(|_| dice.draw()));
        }
        let mut own = Dice::new(self.seed ^ 0x6f77_6e00, number as u64);
        tokens.extend((whole..request.input_tokens as usize).map(|_| own.draw()));
        let mut body = json!({
            "model": self.model,
            "max_tokens": request.output_tokens.min(self.max_output),
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match self.form {
            Form::Completions => {
                let span = self.vocabulary.saturating_sub(LOWEST_TOKEN).max(1);
                let tokens = tokens.iter().map(|drawn| Value::from(LOWEST_TOKEN + drawn % span));
                body["prompt"] = tokens.collect();
            }
            Form::Chat => {
                let words: Vec<&str> =
                    tokens.iter().map(|drawn| WORDS[*drawn as usize % WORDS.len()]).collect();
                body["messages"] = json!([{ "role": "user", "content": words.join(" ") }]);
            }
            Form::Letters => {
                let letters: String =
                    tokens.iter().map(|drawn| char::from(b'a' + (drawn % 26) as u8)).collect();
                body["messages"] = json!([{ "role": "user", "content": letters }]);
            }
        }
        Bytes::from(body.to_string())
    }
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, of: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ of.wrapping_mul(0xD134_2543_DE82_EF95))
    }

    fn draw(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 33) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvlane_sim::trace::Start;

    fn tokens(maker: &Maker, trace: &Trace, number: usize) -> Vec<u64> {
        let body: Value =
            serde_json::from_slice(&maker.body(trace, &trace.requests[number], number)).expect("JSON");
        body["prompt"].as_array().expect("ids").iter().map(|t| t.as_u64().expect("a number")).collect()
    }

    #[test]
    fn prompts_share_what_the_trace_says_and_no_more() {
        let mut trace = Trace::new("t", 8);
        trace.push(0, Start::AtMs(0.0), 20, 5, &[1, 2]);
        trace.push(1, Start::AtMs(1.0), 24, 50, &[1, 2, 3]);
        trace.push(2, Start::AtMs(2.0), 20, 5, &[1, 2]);
        let mut maker = Maker {
            form: Form::Completions,
            model: "m".into(),
            vocabulary: 30_000,
            seed: 1,
            max_output: 10,
            ignore_eos: true,
        };
        let [a, b, c] = [0, 1, 2].map(|number| tokens(&maker, &trace, number));
        assert_eq!((a.len(), b.len(), c.len()), (20, 24, 20));
        assert!(a[..16] == b[..16] && a[..16] == c[..16]);
        assert!(a[16..] != b[16..20] && a[16..] != c[16..], "the tail is the request's own");
        assert!(a.iter().all(|token| (1_000..30_000).contains(token)));
        assert_eq!(tokens(&maker, &trace, 0), a, "the same each time");
        let body: Value = serde_json::from_slice(&maker.body(&trace, &trace.requests[1], 1)).expect("JSON");
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(10), &json!(true)));
        maker.form = Form::Chat;
        let body: Value = serde_json::from_slice(&maker.body(&trace, &trace.requests[1], 1)).expect("JSON");
        let text = body["messages"][0]["content"].as_str().expect("text");
        assert_eq!(text.split(' ').count(), 24);
        maker.form = Form::Letters;
        let body: Value = serde_json::from_slice(&maker.body(&trace, &trace.requests[1], 1)).expect("JSON");
        assert_eq!(body["messages"][0]["content"].as_str().map(str::len), Some(24));
    }
}
