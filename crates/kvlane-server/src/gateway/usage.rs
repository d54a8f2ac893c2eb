//! The engine's own count of cached tokens, read from the response as it passes by.
//!
//! `usage.prompt_tokens_details.cached_tokens` is looked for in JSON bodies and in every event of a stream, without
//! holding back, copying or changing a byte. A JSON parser would need the whole body; a search for the bytes would be
//! fooled by nested objects of the same name. So this is a scanner that knows strings, nesting, and how much of the wanted path the open
//! objects make up. It keeps a few words of state however long the body is.

/// What the engine said about the prompt; `None` = it did not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u64>,
    /// Tokens of it that were taken from the cache.
    pub cached_tokens: Option<u64>,
    /// Tokens generated.
    pub completion_tokens: Option<u64>,
}

/// Reads [`Usage`] from a body in pieces of any size.
#[derive(Debug)]
pub(crate) struct UsageScanner {
    /// Server-sent events: every line begins a new value.
    lines: bool,
    state: State,
    /// Open objects and arrays.
    depth: u32,
    /// How many of the outermost open objects lie on the wanted path (the root object is the first).
    on_path: u32,
    /// The bytes of the string being read or read last, if it is short enough to be a wanted key.
    key: [u8; KEY_BYTES],
    /// Length of that string; above [`KEY_BYTES`]: not a wanted key.
    key_len: usize,
    number: u64,
    found: Usage,
}

/// The longest wanted key.
const KEY_BYTES: usize = "prompt_tokens_details".len();

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Between tokens; the last string may be a key.
    Between,
    /// After `"key":`, before its value.
    Value,
    /// In a number that is wanted.
    Number,
    /// In a string.
    Text,
    /// In a string, after a backslash.
    Escape,
}

impl UsageScanner {
    /// A scanner for one response: `event_stream` if it is `text/event-stream`.
    pub(crate) fn new(event_stream: bool) -> Self {
        Self {
            lines: event_stream,
            state: State::Between,
            depth: 0,
            on_path: 0,
            key: [0; KEY_BYTES],
            key_len: 0,
            number: 0,
            found: Usage::default(),
        }
    }

    /// What was found so far; the last value of each, where several were.
    pub(crate) fn usage(&self) -> Usage {
        self.found
    }

    /// Reads on.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match self.state {
                State::Text => {
                    // Most of a body is text: jump to what may end it.
                    let rest = &bytes[at..];
                    let run = memchr::memchr3(b'"', b'\\', b'\n', rest).unwrap_or(rest.len());
                    self.keep(&rest[..run]);
                    at += run;
                    match rest.get(run) {
                        Some(b'"') => self.state = State::Between,
                        Some(b'\\') => self.state = State::Escape,
                        // JSON has no line end in a string, so this line of a stream was not JSON.
                        Some(b'\n') if self.lines => self.structure(b'\n'),
                        Some(other) => self.keep(&[*other]),
                        None => return,
                    }
                }
                State::Escape => {
                    // No wanted key has an escape.
                    self.key_len = usize::MAX;
                    self.state = State::Text;
                }
                State::Number if byte.is_ascii_digit() => {
                    self.number = self.number.saturating_mul(10).saturating_add(u64::from(byte - b'0'));
                }
                State::Number => {
                    self.store();
                    self.state = State::Between;
                    continue;
                }
                State::Between | State::Value => self.structure(byte),
            }
            at += 1;
        }
    }

    fn keep(&mut self, run: &[u8]) {
        let end = self.key_len.saturating_add(run.len());
        if let Some(place) = self.key.get_mut(self.key_len..end) {
            place.copy_from_slice(run);
        }
        self.key_len = end;
    }

    fn structure(&mut self, byte: u8) {
        match byte {
            b'"' => {
                self.key_len = 0;
                self.state = State::Text;
            }
            b':' if self.depth > 0 => self.state = State::Value,
            b'{' => {
                let wanted = match self.on_path {
                    0 => self.depth == 0,
                    1 => self.state == State::Value && self.depth == 1 && self.key() == b"usage",
                    2 => {
                        self.state == State::Value
                            && self.depth == 2
                            && self.key() == b"prompt_tokens_details"
                    }
                    _ => false,
                };
                self.depth = self.depth.saturating_add(1);
                if wanted {
                    self.on_path = self.depth;
                }
                self.state = State::Between;
            }
            b'[' => {
                self.depth = self.depth.saturating_add(1);
                self.state = State::Between;
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.on_path = self.on_path.min(self.depth);
                self.state = State::Between;
            }
            b',' => self.state = State::Between,
            b'\n' if self.lines => {
                self.depth = 0;
                self.on_path = 0;
                self.state = State::Between;
            }
            b'0'..=b'9' if self.state == State::Value && self.place().is_some() => {
                self.number = u64::from(byte - b'0');
                self.state = State::Number;
            }
            _ => {}
        }
    }

    fn key(&self) -> &[u8] {
        self.key.get(..self.key_len).unwrap_or(&[])
    }

    /// Where the value of the last key belongs, if it is a wanted one in the right object.
    fn place(&mut self) -> Option<&mut Option<u64>> {
        if self.on_path != self.depth {
            return None;
        }
        let key = self.key.get(..self.key_len)?;
        match (self.on_path, key) {
            (2, b"prompt_tokens") => Some(&mut self.found.prompt_tokens),
            (2, b"completion_tokens") => Some(&mut self.found.completion_tokens),
            (3, b"cached_tokens") => Some(&mut self.found.cached_tokens),
            _ => None,
        }
    }

    fn store(&mut self) {
        let number = self.number;
        if let Some(place) = self.place() {
            *place = Some(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same answer whole, byte by byte, and in two pieces cut anywhere.
    fn check(event_stream: bool, body: &str, cached: Option<u64>) {
        let scan = |pieces: &[&[u8]]| {
            let mut scanner = UsageScanner::new(event_stream);
            pieces.iter().for_each(|p| scanner.feed(p));
            scanner.usage().cached_tokens
        };
        let bytes = body.as_bytes();
        assert_eq!(scan(&[bytes]), cached, "{body}");
        assert_eq!(scan(&bytes.chunks(1).collect::<Vec<_>>()), cached, "byte by byte: {body}");
        for cut in 0..bytes.len() {
            assert_eq!(scan(&[&bytes[..cut], &bytes[cut..]]), cached, "cut at {cut}: {body}");
        }
    }

    #[test]
    fn reads_a_plain_body() {
        check(
            false,
            r#"{"id":"x","choices":[{"message":{"content":"hi"}}],
                "usage": {"prompt_tokens":9,"prompt_tokens_details": { "cached_tokens" : 64 } } }"#,
            Some(64),
        );
        check(false, r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":null}}"#, None);
        check(false, r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":null}}}"#, None);
    }

    #[test]
    fn reads_the_last_event_of_a_stream() {
        check(
            true,
            "data: {\"choices\":[{\"delta\":{\"content\":\"{\"}}]}\n\n\
             : \"a comment\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":32}}}\n\ndata: [DONE]\n\n",
            Some(32),
        );
    }

    #[test]
    fn is_not_fooled_by_text_or_by_other_objects() {
        check(
            false,
            r#"{"choices":[{"text":"\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":7}}\\"}]}"#,
            None,
        );
        check(false, r#"{"a":{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}}"#, None);
        check(false, r#"{"usage":{"x":{"cached_tokens":7},"cached_tokens":8}}"#, None);
        check(false, r#"{"usage":[{"prompt_tokens_details":{"cached_tokens":7}}]}"#, None);
        check(false, r#"[{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}]"#, None);
    }

    #[test]
    fn reads_the_other_counts() {
        let mut scanner = UsageScanner::new(false);
        scanner.feed(br#"{"usage":{"prompt_tokens":12,"total_tokens":17,"completion_tokens":5}}"#);
        let want = Usage { prompt_tokens: Some(12), cached_tokens: None, completion_tokens: Some(5) };
        assert_eq!(scanner.usage(), want);
    }

    #[test]
    fn survives_garbage() {
        for body in [
            "",
            "}}}}]]]]",
            "\"",
            "{\"usage\":{\"prompt_tokens\":99999999999999999999999}}",
            "\0\u{1}{:{:{:1",
        ] {
            let mut scanner = UsageScanner::new(true);
            scanner.feed(body.as_bytes());
            scanner.feed(&[0xff, b'\\', b'"', b'\\']);
        }
    }
}
