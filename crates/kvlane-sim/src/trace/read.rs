//! Readers of the public trace formats, plain or gzip.
//!
//! Mooncake JSONL is the common base: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`, with `session_id` and `delay` (ms after the
//! previous answer) for sessions. Its block size is in the file only if `kvlane record` wrote it. The trap is what a later turn's `input_length` means; see [`PromptMode`].

use super::{Start, Trace};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::io::{BufRead, BufReader, Read};

/// The longest line read; a prompt of a million tokens in 16-token blocks needs about 1 MB.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Most requests read from one file.
const MAX_REQUESTS: usize = 20_000_000;

/// Most turns of one session whose prompts are joined in [`PromptMode::Delta`]; bounds its quadratic growth.
const MAX_DELTA_BLOCKS: usize = 1 << 20;

/// Which format a file is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Mooncake JSONL, with the extensions of the other tools.
    Mooncake,
    /// Qwen/Bailian JSONL: `chat_id`, `parent_chat_id`, `timestamp` in seconds; open loop.
    Bailian,
    /// Azure CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`; no prefixes.
    Azure,
    /// Weka / kv-cache-tester JSON, one session a line or a file; carries its block size.
    Weka,
}

impl Format {
    /// From the first line of a file; `None` if it is none of them.
    pub fn detect(first_line: &str) -> Option<Self> {
        let line = first_line.trim_start_matches('\u{feff}').trim_start();
        if line.starts_with("TIMESTAMP") {
            Some(Self::Azure)
        } else if line.contains("\"chat_id\"") {
            Some(Self::Bailian)
        } else if line.contains("\"requests\"") || line == "{" {
            Some(Self::Weka)
        } else if line.contains("_length\"") || line.contains("_tokens\"") {
            Some(Self::Mooncake)
        } else {
            None
        }
    }
}

/// What the later rows of a session hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PromptMode {
    /// Each row is the whole prompt.
    #[default]
    Whole,
    /// Each row is only what is new; the rows before it are put in front.
    Delta,
}

/// How to read.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// The format; `None` = told from the first line.
    pub format: Option<Format>,
    /// Tokens in a block; `None` = the format's usual: 512 for Mooncake, 16 for Bailian, what the file says for Weka.
    pub block_tokens: Option<u32>,
    /// What later rows of a session hold.
    pub prompt_mode: PromptMode,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { format: None, block_tokens: None, prompt_mode: PromptMode::Whole }
    }
}

/// Why a trace could not be read. Names the line, never its content.
#[derive(Debug)]
pub enum ReadError {
    /// The file could not be read or unpacked.
    Io(std::io::Error),
    /// The first line is of no known format: name it.
    UnknownFormat,
    /// A line is not of the format.
    Line {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The file holds no request.
    Empty,
    /// The file holds more than can be simulated: cut it.
    TooLong,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(e) => write!(f, "cannot read the trace: {e}"),
            Self::UnknownFormat => {
                f.write_str("the first line is of no known trace format (mooncake, bailian, azure, weka)")
            }
            Self::Line { number, why } => write!(f, "line {number} of the trace: {why}"),
            Self::Empty => f.write_str("the trace holds no request"),
            Self::TooLong => write!(f, "the trace holds more than {MAX_REQUESTS} requests or 2^32 block ids"),
        }
    }
}

impl std::error::Error for ReadError {}

impl From<std::io::Error> for ReadError {
    fn from(e: std::io::Error) -> Self {
        Self::Io(e)
    }
}

/// Numbers for names, in order of first sight.
struct Interner<K>(HashMap<K, u32>);

impl<K> Default for Interner<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: std::hash::Hash + Eq> Interner<K> {
    fn number(&mut self, key: K) -> Result<u32, ReadError> {
        let next = u32::try_from(self.0.len()).map_err(|_| ReadError::TooLong)?;
        Ok(*self.0.entry(key).or_insert(next))
    }
}

/// Reads a trace; gzip is told by its first bytes.
pub fn read(name: &str, mut input: impl BufRead, options: &ReadOptions) -> Result<Trace, ReadError> {
    if input.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        let plain = BufReader::new(flate2::bufread::MultiGzDecoder::new(input));
        read_plain(name, plain, options)
    } else {
        read_plain(name, input, options)
    }
}

fn read_plain(name: &str, mut input: impl BufRead, options: &ReadOptions) -> Result<Trace, ReadError> {
    let mut line = String::new();
    let mut number = 0;
    while line.trim().is_empty() {
        line.clear();
        number += 1;
        if next_line(&mut input, &mut line, number)? == 0 {
            return Err(ReadError::Empty);
        }
    }
    let format = options.format.or_else(|| Format::detect(&line)).ok_or(ReadError::UnknownFormat)?;
    let mut rows: Box<dyn Rows> = match format {
        Format::Mooncake => Box::new(Mooncake::new(name, options)),
        Format::Bailian => Box::new(Bailian {
            trace: Trace::new(name, options.block_tokens.unwrap_or(16)),
            ids: Interner::default(),
            chats: Interner::default(),
        }),
        Format::Azure => {
            Box::new(Azure { trace: Trace::new(name, options.block_tokens.unwrap_or(512)), first_s: None })
        }
        Format::Weka => {
            let mut all = line;
            input.take(MAX_LINE_BYTES * 16).read_to_string(&mut all)?;
            return finish(read_weka(name, &all, options)?);
        }
    };
    loop {
        if !line.trim().is_empty() {
            rows.line(line.trim_end()).map_err(|e| match e {
                RowError::Why(why) => ReadError::Line { number, why },
                RowError::TooLong => ReadError::TooLong,
            })?;
        }
        if rows.trace().requests.len() > MAX_REQUESTS {
            return Err(ReadError::TooLong);
        }
        line.clear();
        number += 1;
        if next_line(&mut input, &mut line, number)? == 0 {
            break;
        }
    }
    finish(std::mem::take(rows.trace()))
}

fn next_line(input: &mut impl BufRead, line: &mut String, number: usize) -> Result<usize, ReadError> {
    let n = input.take(MAX_LINE_BYTES).read_line(line)?;
    if n as u64 == MAX_LINE_BYTES {
        return Err(ReadError::Line { number, why: format!("longer than {MAX_LINE_BYTES} bytes") });
    }
    Ok(n)
}

fn finish(mut trace: Trace) -> Result<Trace, ReadError> {
    if trace.requests.is_empty() {
        return Err(ReadError::Empty);
    }
    super::arrival::order(&mut trace);
    if trace.sessions() as usize == trace.requests.len() {
        super::arrival::infer_sessions(&mut trace);
    }
    Ok(trace)
}

enum RowError {
    Why(String),
    TooLong,
}

impl From<ReadError> for RowError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::TooLong => Self::TooLong,
            other => Self::Why(other.to_string()),
        }
    }
}

/// A format of one request a line.
trait Rows {
    fn line(&mut self, line: &str) -> Result<(), RowError>;
    fn trace(&mut self) -> &mut Trace;
}

/// Parses one JSON line; the error has a column and never the content.
fn json<'a, T: Deserialize<'a>>(line: &'a str) -> Result<T, RowError> {
    serde_json::from_str(line).map_err(|e| {
        let kind = match e.classify() {
            serde_json::error::Category::Data => "a field is absent or of the wrong type",
            _ => "not JSON",
        };
        RowError::Why(format!("{kind}, near column {}", e.column()))
    })
}

/// Times and lengths that a simulation can hold: finite, not negative.
fn sane_ms(ms: f64) -> Result<f64, RowError> {
    if (0.0..1e12).contains(&ms) {
        Ok(ms)
    } else {
        Err(RowError::Why("a time is negative or too large".to_owned()))
    }
}

#[derive(Deserialize)]
struct MooncakeRow {
    #[serde(alias = "created_time")]
    timestamp: Option<f64>,
    #[serde(alias = "delay_ms")]
    delay: Option<f64>,
    #[serde(alias = "input_tokens")]
    input_length: u32,
    #[serde(alias = "output_tokens")]
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
    session_id: Option<SessionKey>,
    /// Only in what `kvlane record` writes.
    block_size: Option<u32>,
}

#[derive(Deserialize, Clone, PartialEq, Eq, Hash)]
#[serde(untagged)]
enum SessionKey {
    Number(u64),
    Name(String),
}

/// What the next turn of a session needs to know of the one before.
#[derive(Default, Clone)]
struct Before {
    timestamp: Option<f64>,
    blocks: Vec<u32>,
    tokens: u32,
}

struct Mooncake {
    trace: Trace,
    mode: PromptMode,
    ids: Interner<u64>,
    sessions: Interner<SessionKey>,
    before: HashMap<u32, Before>,
    alone: u32,
    /// What the rows say, unless the caller knows better.
    said_block_tokens: Option<u32>,
    told_block_tokens: bool,
}

impl Mooncake {
    fn new(name: &str, options: &ReadOptions) -> Self {
        Self {
            trace: Trace::new(name, options.block_tokens.unwrap_or(512)),
            mode: options.prompt_mode,
            ids: Interner::default(),
            sessions: Interner::default(),
            before: HashMap::new(),
            alone: 0,
            said_block_tokens: None,
            told_block_tokens: options.block_tokens.is_some(),
        }
    }
}

impl Rows for Mooncake {
    fn line(&mut self, line: &str) -> Result<(), RowError> {
        let row: MooncakeRow = json(line)?;
        if let Some(tokens) = row.block_size.filter(|n| *n > 0 && !self.told_block_tokens) {
            if *self.said_block_tokens.get_or_insert(tokens) != tokens {
                return Err(RowError::Why("its block size differs from that of the rows before".to_owned()));
            }
            self.trace.block_tokens = tokens;
        }
        let mut blocks = Vec::with_capacity(row.hash_ids.len());
        for id in &row.hash_ids {
            blocks.push(self.ids.number(*id)?);
        }
        let Some(key) = row.session_id else {
            let at = row
                .timestamp
                .ok_or_else(|| RowError::Why("a row without a session needs a timestamp".to_owned()))?;
            // Numbered from the top, so that they never meet the interned sessions; renumbered at the end.
            let session = u32::MAX - 1 - self.alone;
            self.alone += 1;
            self.trace.push(session, Start::AtMs(sane_ms(at)?), row.input_length, row.output_length, &blocks);
            return Ok(());
        };
        let session = self.sessions.number(key)?;
        let first = !self.before.contains_key(&session);
        let before = self.before.entry(session).or_default();
        let start = match (row.timestamp, row.delay) {
            (Some(at), None | Some(0.0)) if first => Start::AtMs(sane_ms(at)?),
            _ if first => {
                return Err(RowError::Why(
                    "the first turn of a session needs a timestamp and no delay".to_owned(),
                ));
            }
            (_, Some(delay)) => Start::AfterMs(sane_ms(delay)?),
            (Some(at), None) => Start::AfterMs(sane_ms((at - before.timestamp.unwrap_or(at)).max(0.0))?),
            (None, None) => Start::AfterMs(0.0),
        };
        let mut input = row.input_length;
        if self.mode == PromptMode::Delta {
            input = input.saturating_add(before.tokens);
            before.blocks.extend_from_slice(&blocks);
            if before.blocks.len() > MAX_DELTA_BLOCKS {
                return Err(RowError::TooLong);
            }
            blocks.clone_from(&before.blocks);
            before.tokens = input;
        }
        before.timestamp = row.timestamp.or(before.timestamp);
        self.trace.push(session, start, input, row.output_length, &blocks);
        Ok(())
    }

    fn trace(&mut self) -> &mut Trace {
        &mut self.trace
    }
}

#[derive(Deserialize)]
struct BailianRow {
    chat_id: i64,
    #[serde(default)]
    parent_chat_id: Option<i64>,
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

struct Bailian {
    trace: Trace,
    ids: Interner<u64>,
    chats: Interner<i64>,
}

impl Rows for Bailian {
    fn line(&mut self, line: &str) -> Result<(), RowError> {
        let row: BailianRow = json(line)?;
        let mut blocks = Vec::with_capacity(row.hash_ids.len());
        for id in &row.hash_ids {
            blocks.push(self.ids.number(*id)?);
        }
        // A turn belongs to its parent's session; an unknown parent (cut off the file) begins one.
        let parent = row.parent_chat_id.filter(|p| *p >= 0).and_then(|p| self.chats.0.get(&p).copied());
        let session = match parent {
            Some(session) => {
                self.chats.0.insert(row.chat_id, session);
                session
            }
            None => self.chats.number(row.chat_id)?,
        };
        let start = Start::AtMs(sane_ms(row.timestamp * 1000.0)?);
        self.trace.push(session, start, row.input_length, row.output_length, &blocks);
        Ok(())
    }

    fn trace(&mut self) -> &mut Trace {
        &mut self.trace
    }
}

struct Azure {
    trace: Trace,
    first_s: Option<f64>,
}

impl Rows for Azure {
    fn line(&mut self, line: &str) -> Result<(), RowError> {
        let line = line.trim_start_matches('\u{feff}');
        if line.starts_with("TIMESTAMP") {
            return Ok(());
        }
        let mut fields = line.split(',');
        let (Some(at), Some(input), Some(output)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(RowError::Why("fewer than 3 fields".to_owned()));
        };
        let at_s = seconds(at)
            .ok_or_else(|| RowError::Why("the time is not YYYY-MM-DD HH:MM:SS.fraction".to_owned()))?;
        let length = |s: &str| {
            s.trim().parse::<u32>().map_err(|_| RowError::Why("a length is not a number".to_owned()))
        };
        let first = *self.first_s.get_or_insert(at_s);
        let session = self.trace.requests.len() as u32;
        let start = Start::AtMs(sane_ms((at_s - first).max(0.0) * 1000.0)?);
        self.trace.push(session, start, length(input)?, length(output)?, &[]);
        Ok(())
    }

    fn trace(&mut self) -> &mut Trace {
        &mut self.trace
    }
}

/// Seconds since some day of `YYYY-MM-DD HH:MM:SS.fraction`.
fn seconds(text: &str) -> Option<f64> {
    let (date, time) = text.trim().split_once([' ', 'T'])?;
    let mut date = date.split('-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    // Days from civil: the years begin in March, so that the leap day is their last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    let mut time = time.trim_end_matches('Z').split(':').map(str::parse::<f64>);
    let (h, m, s) = (time.next()?.ok()?, time.next()?.ok()?, time.next()?.ok()?);
    Some(days as f64 * 86_400.0 + h * 3600.0 + m * 60.0 + s)
}

#[derive(Deserialize)]
struct WekaSession {
    block_size: Option<u32>,
    /// `local`: ids mean nothing outside this session.
    #[serde(default)]
    hash_id_scope: Option<String>,
    #[serde(default)]
    requests: Vec<WekaRequest>,
}

#[derive(Deserialize)]
struct WekaRequest {
    #[serde(default)]
    t: f64,
    #[serde(default, rename = "in")]
    input: u32,
    #[serde(default, rename = "out")]
    output: u32,
    #[serde(default)]
    think_time: Option<f64>,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Sessions of whole prompts; a later turn follows the previous answer by its think time. Nested requests (subagents) are left out.
fn read_weka(name: &str, text: &str, options: &ReadOptions) -> Result<Trace, ReadError> {
    let mut trace: Option<Trace> = None;
    let mut ids: Interner<(u32, u64)> = Interner::default();
    let stream = serde_json::Deserializer::from_str(text).into_iter::<WekaSession>();
    for (session, parsed) in stream.enumerate() {
        let parsed = parsed.map_err(|e| ReadError::Line {
            number: e.line(),
            why: "not a session of this format".to_owned(),
        })?;
        let session = u32::try_from(session).map_err(|_| ReadError::TooLong)?;
        let block_tokens = options.block_tokens.or(parsed.block_size).unwrap_or(64).max(1);
        let trace = trace.get_or_insert_with(|| Trace::new(name, block_tokens));
        let scope = if parsed.hash_id_scope.as_deref() == Some("local") { session + 1 } else { 0 };
        let mut first = true;
        for request in &parsed.requests {
            if request.input == 0 {
                continue;
            }
            let mut blocks = Vec::with_capacity(request.hash_ids.len());
            for id in &request.hash_ids {
                blocks.push(ids.number((scope, *id))?);
            }
            let start = if first {
                Start::AtMs(request.t.max(0.0) * 1000.0)
            } else {
                Start::AfterMs(request.think_time.unwrap_or(0.0).max(0.0) * 1000.0)
            };
            first = false;
            trace.push(session, start, request.input, request.output, &blocks);
        }
    }
    trace.ok_or(ReadError::Empty)
}
