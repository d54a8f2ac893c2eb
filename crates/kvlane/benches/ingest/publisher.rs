//! The publisher of the ingest bench, in a process of its own so that its cost is not mixed with the router's.
//!
//! Batches are encoded before the clock starts and written as libzmq writes them (messages gathered up to 8 KiB, larger ones alone), over
//! plain blocking sockets: what is left of a publisher is memcpy and `write`. Unlike a PUB socket it waits for a slow subscriber instead of
//! dropping, so that the rate measured is the subscriber's.

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const TOPIC: &str = "kv";
pub const BLOCK: usize = 16;
/// Blocks of a prompt; each block is an event of its own.
pub const PROMPT: usize = 32;
/// Prompts that fit into the publisher's cache.
const CACHED: usize = 2048;
/// Different prompts; then they come again.
pub const CYCLE: usize = 2 * CACHED;
/// libzmq gathers so many bytes of small messages for one write (`ZMQ_OUT_BATCH_SIZE`).
const WRITE_BYTES: usize = 8192;
/// Batches a second that each of many streams publishes while its past is replayed.
const LIVE_PER_S: u64 = 20;

/// `live PER_BATCH BATCHES`, or `kept STREAMS BATCHES FILE`: prints the ports, and after each round its own CPU seconds.
pub fn main(args: &[String]) {
    let number = |i: usize| args[i].parse::<usize>().expect("a number");
    match args[0].as_str() {
        "live" => live(number(1), number(2)),
        _ => kept(number(1), number(2) as u64, &args[3]),
    }
}

fn bind() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

fn live(per_batch: usize, batches: usize) {
    let mut messages = Messages::of(per_batch);
    let (listener, port) = bind();
    println!("{port}");
    let mut stream = accept(&listener, "PUB");
    let mut stdin = std::io::stdin().lock();
    let mut line = String::new();
    stdin.read_line(&mut line).expect("the bench says when");
    let start = super::cpu_s();
    for seq in 0..batches {
        messages.send(seq as u64, &mut stream);
    }
    messages.flush(&mut stream);
    println!("{}", super::cpu_s() - start);
    // Until the bench is done: the end of the connection would be a loss.
    let _ = stdin.read_line(&mut line);
}

/// Encoded messages of one cycle.
struct Messages {
    /// The first time, when nothing is evicted yet, then again and again.
    first: Vec<Vec<u8>>,
    again: Vec<Vec<u8>>,
    gathered: Vec<u8>,
}

impl Messages {
    fn of(per_batch: usize) -> Self {
        let prompts: Vec<Prompt> = (0..CYCLE).map(Prompt::new).collect();
        let events = |first: bool| {
            let mut events = Vec::new();
            for (i, prompt) in prompts.iter().enumerate() {
                if !first || i >= CACHED {
                    events.push(prompts[(i + CYCLE - CACHED) % CYCLE].removed());
                }
                events.extend((0..PROMPT).map(|at| prompt.stored(at)));
            }
            events
        };
        let messages = |events: Vec<Vec<u8>>| events.chunks(per_batch).map(message).collect();
        Self { first: messages(events(true)), again: messages(events(false)), gathered: Vec::new() }
    }

    fn send(&mut self, seq: u64, stream: &mut TcpStream) {
        let at = seq as usize;
        let bytes = match at.checked_sub(self.first.len()) {
            None => &self.first[at],
            Some(at) => &self.again[at % self.again.len()],
        };
        let start = self.gathered.len();
        self.gathered.extend_from_slice(bytes);
        let seq_at = start + 2 + TOPIC.len() + 2;
        self.gathered[seq_at..seq_at + 8].copy_from_slice(&seq.to_be_bytes());
        if self.gathered.len() >= WRITE_BYTES {
            self.flush(stream);
        }
    }

    fn flush(&mut self, stream: &mut TcpStream) {
        stream.write_all(&self.gathered).expect("the subscriber is there");
        self.gathered.clear();
    }
}

/// Events in a batch: on the way through the first cycle, and on any later one.
pub fn events(per_batch: usize, batches: usize) -> usize {
    let first = (CYCLE * PROMPT + CYCLE - CACHED).div_ceil(per_batch);
    let last = |events: usize| events - (events.div_ceil(per_batch) - 1) * per_batch;
    let (in_first, in_again) = (CYCLE * PROMPT + CYCLE - CACHED, CYCLE * (PROMPT + 1));
    let again = in_again.div_ceil(per_batch);
    let mut sum = 0;
    for batch in 0..batches {
        sum += match batch.checked_sub(first) {
            None if batch + 1 == first => last(in_first),
            Some(at) if at % again + 1 == again => last(in_again),
            _ => per_batch,
        };
    }
    sum
}

/// A prompt with the names of its blocks.
pub struct Prompt {
    pub tokens: Vec<u32>,
    names: Vec<u64>,
}

impl Prompt {
    pub fn new(number: usize) -> Self {
        let mut state = number as u64 ^ 0x9e37_79b9_7f4a_7c15;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        };
        // A vocabulary of 128k: most ids take three or five bytes.
        let tokens = (0..PROMPT * BLOCK).map(|_| ((next() >> 32) % 128_000) as u32).collect();
        Self { tokens, names: (0..PROMPT).map(|_| next() | 1 << 63).collect() }
    }

    /// As vLLM 0.32 prints it.
    fn stored(&self, at: usize) -> Vec<u8> {
        let mut out = vec![0x8b];
        text(&mut out, "type");
        text(&mut out, "BlockStored");
        text(&mut out, "block_hashes");
        out.push(0x91);
        hash(&mut out, self.names[at]);
        text(&mut out, "parent_block_hash");
        match at.checked_sub(1) {
            Some(before) => hash(&mut out, self.names[before]),
            None => out.push(0xc0),
        }
        text(&mut out, "token_ids");
        out.extend([0xdc, 0, BLOCK as u8]);
        for &id in &self.tokens[at * BLOCK..][..BLOCK] {
            match id {
                0..=127 => out.push(id as u8),
                128..=255 => out.extend([0xcc, id as u8]),
                256..=65_535 => {
                    out.push(0xcd);
                    out.extend((id as u16).to_be_bytes());
                }
                _ => {
                    out.push(0xce);
                    out.extend(id.to_be_bytes());
                }
            }
        }
        text(&mut out, "block_size");
        out.push(BLOCK as u8);
        text(&mut out, "lora_id");
        out.push(0xc0);
        text(&mut out, "medium");
        text(&mut out, "GPU");
        text(&mut out, "lora_name");
        out.push(0xc0);
        text(&mut out, "extra_keys");
        out.extend([0x91, 0xc0]);
        text(&mut out, "group_idx");
        out.push(0);
        text(&mut out, "kv_cache_spec_kind");
        text(&mut out, "full_attention");
        out
    }

    fn removed(&self) -> Vec<u8> {
        let mut out = vec![0x84];
        text(&mut out, "type");
        text(&mut out, "BlockRemoved");
        text(&mut out, "block_hashes");
        out.extend([0xdc, 0, PROMPT as u8]);
        for &name in self.names.iter().rev() {
            hash(&mut out, name);
        }
        text(&mut out, "medium");
        text(&mut out, "GPU");
        text(&mut out, "group_idx");
        out.push(0);
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(0xa0 | text.len() as u8);
    out.extend(text.as_bytes());
}

fn hash(out: &mut Vec<u8>, name: u64) {
    out.push(0xcf);
    out.extend(name.to_be_bytes());
}

/// A batch of events as a ZMQ message of three frames, with sequence number 0.
fn message(events: &[Vec<u8>]) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let mut payload = vec![0x93, 0xcb];
    payload.extend(now.as_secs_f64().to_be_bytes());
    payload.push(0xdd);
    payload.extend((events.len() as u32).to_be_bytes());
    payload.extend(events.concat());
    payload.push(0);
    let mut out = Vec::new();
    frame(&mut out, true, TOPIC.as_bytes());
    frame(&mut out, true, &[0; 8]);
    frame(&mut out, false, &payload);
    out
}

/// A frame of ZMTP 3.0 (<https://rfc.zeromq.org/spec/23/>).
fn frame(out: &mut Vec<u8>, more: bool, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(len) => out.extend([u8::from(more), len]),
        Err(_) => {
            out.push(2 | u8::from(more));
            out.extend((body.len() as u64).to_be_bytes());
        }
    }
    out.extend(body);
}

/// Waits for a peer and shakes hands as a socket of this type.
fn accept(listener: &TcpListener, kind: &str) -> TcpStream {
    loop {
        let (stream, _) = listener.accept().expect("listening");
        // A probe connects and leaves.
        if let Ok(stream) = shake_hands(stream, kind) {
            return stream;
        }
    }
}

fn shake_hands(mut stream: TcpStream, kind: &str) -> std::io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting)?;
    stream.read_exact(&mut greeting)?;
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend((kind.len() as u32).to_be_bytes());
    ready.extend(kind.as_bytes());
    let mut out = vec![4, ready.len() as u8];
    out.extend(ready);
    stream.write_all(&out)?;
    read_frame(&mut stream)?;
    if kind == "PUB" {
        // The subscription.
        read_frame(&mut stream)?;
    }
    Ok(stream)
}

fn read_frame(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut head = [0; 2];
    stream.read_exact(&mut head)?;
    let mut body = vec![0; usize::from(head[1])];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// Recorded payloads played in a loop, each round begun by a clear.
struct Loop {
    payloads: Vec<Vec<u8>>,
    began_s: f64,
}

impl Loop {
    fn message(&self, replayed: bool, seq: u64, out: &mut Vec<u8>) {
        if replayed {
            frame(out, true, b"");
        }
        frame(out, true, TOPIC.as_bytes());
        frame(out, true, &seq.to_be_bytes());
        let mut payload = match (seq as usize % (self.payloads.len() + 1)).checked_sub(1) {
            Some(at) => self.payloads[at].clone(),
            None => b"\x93\xcb........\x91\x81\xa4type\xb0AllBlocksCleared\x00".to_vec(),
        };
        // Its time of publishing goes on.
        payload[2..10].copy_from_slice(&(self.began_s + seq as f64 * 1e-3).to_be_bytes());
        frame(out, false, &payload);
    }
}

fn kept(streams: usize, batches: u64, file: &str) {
    let text = std::fs::read_to_string(file).expect("a recording");
    let unhex = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
    };
    let payloads: Vec<Vec<u8>> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON lines"))
        .filter(|line| line["channel"] == "pub")
        .filter_map(|line| line["frames_hex"].as_array()?.last()?.as_str().map(unhex))
        .inspect(|payload| assert_eq!(payload[..2], [0x93, 0xcb], "a batch with a time"))
        .collect();
    let began_s = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let recorded = std::sync::Arc::new(Loop { payloads, began_s });
    for _ in 0..streams {
        let (publisher, events_port) = bind();
        let (router, replay_port) = bind();
        println!("{events_port} {replay_port}");
        // The number of the next batch.
        let next = std::sync::Arc::new(std::sync::Mutex::new(batches));
        let (loop_, number) = (recorded.clone(), next.clone());
        std::thread::spawn(move || {
            let mut stream = accept(&publisher, "PUB");
            loop {
                let mut out = Vec::new();
                {
                    let mut next = number.lock().expect("no panic");
                    loop_.message(false, *next, &mut out);
                    *next += 1;
                }
                if stream.write_all(&out).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_micros(1_000_000 / LIVE_PER_S));
            }
        });
        let recorded = recorded.clone();
        std::thread::spawn(move || {
            loop {
                let mut stream = accept(&router, "ROUTER");
                let asked = read_frame(&mut stream).and_then(|_delimiter| read_frame(&mut stream));
                let Ok(asked) = asked else { continue };
                let from = asked.iter().fold(0u64, |from, &byte| from << 8 | u64::from(byte));
                let next = *next.lock().expect("no panic");
                let mut out = Vec::new();
                for seq in from..next {
                    recorded.message(true, seq, &mut out);
                    if out.len() >= WRITE_BYTES {
                        if stream.write_all(&out).is_err() {
                            break;
                        }
                        out.clear();
                    }
                }
                for part in [&b""[..], b"", &u64::MAX.to_be_bytes()] {
                    frame(&mut out, true, part);
                }
                frame(&mut out, false, b"");
                let _ = stream.write_all(&out);
            }
        });
    }
    let mut line = String::new();
    let mut stdin = std::io::stdin().lock();
    let start = super::cpu_s();
    while stdin.read_line(&mut line).is_ok_and(|read| read > 0) {
        println!("{}", super::cpu_s() - start);
    }
}
