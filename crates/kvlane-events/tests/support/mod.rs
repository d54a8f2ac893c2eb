//! Reads recorded captures (`tests/captures`, format in its README) and drives stream machines with them.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use kvlane_events::stream::{Action, Input, Limits, Stream, StreamConfig};
use kvlane_events::wire::EngineKind;
use kvlane_index::BlockSize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One line of a capture.
pub enum Line {
    Meta(Value),
    Request(Value),
    Response(Value),
    Frames {
        live: bool,
        source: String,
        frames: Vec<Vec<u8>>,
    },
    Note(String),
    /// An event of TensorRT-LLM's buffered path.
    Drained(Value),
    Other,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// The captures of one folder, sorted by name.
pub fn captures(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(root().join("captures").join(folder))
        .expect("the captures are part of the crate")
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

pub fn read(file: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|line| parse(serde_json::from_str(line).unwrap())).collect()
}

fn parse(mut line: Value) -> Line {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    match text(&line["kind"]).as_str() {
        "meta" => Line::Meta(line),
        "request" => Line::Request(line),
        "response" => Line::Response(line),
        "frames" => Line::Frames {
            live: line["channel"] == "pub",
            source: text(&line["source"]),
            frames: line["frames_hex"].take().as_array().unwrap().iter().map(|f| bytes(&text(f))).collect(),
        },
        "engine_event" => Line::Drained(line["json"].take()),
        "note" => Line::Note(text(&line["text"])),
        _ => Line::Other,
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

/// What a replay socket would answer, by sequence number.
pub type Retained = BTreeMap<u64, Vec<u8>>;

/// The sequence number and the payload of a live or replay message.
pub fn message(frames: &[Vec<u8>]) -> (u64, &[u8]) {
    let [.., seq, payload] = frames else { panic!("at least two frames") };
    (u64::from_be_bytes(seq.as_slice().try_into().unwrap()), payload)
}

/// A stream whose replay requests are answered from what was recorded.
pub struct Follower {
    pub stream: Stream,
    pub retained: Retained,
    attempt: u64,
}

impl Follower {
    pub fn new(engine: EngineKind, block_size: u32, retained: Retained) -> Self {
        let config = StreamConfig {
            engine,
            block_size: BlockSize::new(block_size).unwrap(),
            topic: None,
            replay: true,
            snapshots: false,
            limits: Limits::default(),
        };
        Self { stream: Stream::new(config), retained, attempt: 0 }
    }

    /// Passes one input in and answers every replay request that follows from it.
    pub fn input(&mut self, input: Input<'_>) -> Vec<Action> {
        let mut out = Vec::new();
        self.stream.handle(input, 0, &mut out);
        let mut seen = 0;
        while let Some(action) = out.get(seen) {
            seen += 1;
            let &Action::RequestReplay { attempt, from_seq } = action else { continue };
            assert!(attempt > self.attempt, "attempts only grow");
            self.attempt = attempt;
            for (seq, payload) in self.retained.range(from_seq..) {
                let frames: [&[u8]; 4] = [b"", b"topic", &seq.to_be_bytes(), payload];
                self.stream.handle(Input::Replay { attempt, frames: &frames }, 0, &mut out);
            }
            let end: [&[u8]; 4] = [b"", b"", &u64::MAX.to_be_bytes(), b""];
            self.stream.handle(Input::Replay { attempt, frames: &end }, 0, &mut out);
        }
        out
    }

    pub fn live(&mut self, frames: &[Vec<u8>]) -> Vec<Action> {
        let (seq, payload) = message(frames);
        self.retained.insert(seq, payload.to_vec());
        let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        self.input(Input::Live(&frames))
    }
}
