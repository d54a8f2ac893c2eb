//! `kvlane events` as a user runs it, against a mock engine.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn kvlane(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvlane"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> (bool, String, String) {
    let Output { status, stdout, stderr } = kvlane(args).output().unwrap();
    (status.success(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// Ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Engine {
    port: u16,
    _process: Running,
}

impl Engine {
    fn start(args: &[&str]) -> Self {
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let mut all = vec!["mock-engine", "--listen", &listen, "--speed", "0"];
        all.extend(args);
        let process = Running(kvlane(&all).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let engine = Self { port, _process: process };
        let began = Instant::now();
        while engine.ask("GET", "/health", "").is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "the mock engine does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        engine
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200").then_some(answer)
    }

    /// A prompt of `blocks` whole blocks of 16 tokens, and one token.
    fn prompt(&self, first: u32, blocks: u32) {
        let tokens: Vec<String> = (0..blocks * 16 + 1).map(|i| (first + i % 100).to_string()).collect();
        let body = format!("{{\"model\": \"mock\", \"prompt\": [{}], \"max_tokens\": 1}}", tokens.join(","));
        self.ask("POST", "/v1/completions", &body).expect("an answer");
    }
}

/// Lines of a running command until one holds; the command is ended.
fn lines_until(command: &mut Command, mut holds: impl FnMut(&str) -> bool) -> Vec<String> {
    let mut process = Running(command.stderr(Stdio::null()).spawn().unwrap());
    let output = BufReader::new(process.0.stdout.take().unwrap());
    let mut lines = Vec::new();
    for line in output.lines() {
        lines.push(line.unwrap());
        if holds(lines.last().unwrap()) {
            break;
        }
    }
    lines
}

#[test]
fn check_finds_a_good_engine_good_and_names_what_a_bad_one_lacks() {
    let good = Engine::start(&[]);
    good.prompt(10, 1);
    let (ok, out, err) = run(&["events", "check", &good.url()]);
    assert!(ok, "{out}\n{err}");
    assert!(out.contains("has all") && out.contains("came from the cache, as its events say"), "{out}");
    assert!(out.lines().last().unwrap().starts_with("no problems"), "{out}");

    let mute = Engine::start(&["--no-events"]);
    let (ok, out, err) = run(&["events", "check", &mute.url()]);
    assert!(!ok && out.contains("problem") && out.contains("--kv-events-config '{"), "{out}\n{err}");
}

#[test]
fn a_stream_is_shown_recorded_and_played_back() {
    let engine = Engine::start(&["--ranks", "1"]);
    engine.prompt(10, 3);
    let url = engine.url();

    let shown =
        lines_until(&mut kvlane(&["events", "tail", &url, "--from-start"]), |line| line.contains("stored"));
    assert!(
        shown.last().unwrap().contains("stored  3 blocks (48 tokens of 16) at the root in device"),
        "{shown:?}"
    );
    let shown = lines_until(&mut kvlane(&["events", "tail", &url, "--from-start", "--json"]), |line| {
        line.contains("stored")
    });
    let last: serde_json::Value = serde_json::from_str(shown.last().unwrap()).unwrap();
    assert_eq!(
        (last["seq"].as_u64(), last["events"][0]["block_size"].as_u64()),
        (Some(0), Some(16)),
        "{last}"
    );

    let folder = std::env::temp_dir().join(format!("kvlane-events-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("recorded.jsonl");
    let path = file.to_str().unwrap();
    let recording = kvlane(&["events", "record", &url, path, "--seconds", "3"]).spawn().unwrap();
    // The past was written; now something new comes.
    let began = Instant::now();
    while !std::fs::read_to_string(&file).is_ok_and(|text| text.contains("connected")) {
        if began.elapsed() > Duration::from_secs(2) {
            // Buffered until the end, when little is written.
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    engine.prompt(120, 2);
    let output = recording.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (ok, _, err) = run(&["events", "record", &url, path, "--seconds", "1"]);
    assert!(!ok && err.contains("cannot create"), "a recording is never overwritten: {err}");

    let (ok, out, err) = run(&["events", "replay", path]);
    assert!(ok && out.contains("rank0: 2 batches, 2 events, 0 holes"), "{out}\n{err}");
    assert!(out.contains("holds 5 blocks in device"), "{out}");

    let to = format!("tcp://127.0.0.1:{}", free_port());
    let playing = Running(kvlane(&["events", "replay", path, "--to", &to, "--wait", "2"]).spawn().unwrap());
    let heard = lines_until(&mut kvlane(&["events", "tail", &to]), |line| line.contains("seq 1"));
    assert!(heard.iter().any(|line| line.contains("seq 0") && line.contains("3 blocks")), "{heard:?}");
    drop(playing);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn errors_are_sentences_that_say_what_to_do() {
    let (ok, out, err) = run(&["events", "check", "http://127.0.0.1:1"]);
    assert!(!ok && out.contains("cannot connect"), "{out}\n{err}");
    let (ok, _, err) = run(&["events", "tail", "gpu1:8000"]);
    assert!(!ok && err.contains("write http://HOST:PORT"), "{err}");
    let (ok, _, err) = run(&["events", "replay", "/no/such/file.jsonl"]);
    assert!(!ok && err.contains("cannot read /no/such/file.jsonl"), "{err}");
    let (ok, _, err) = run(&["events", "replay", file!()]);
    assert!(!ok && err.contains("is no JSON") || err.contains("cannot read"), "{err}");
    for command in ["check", "tail", "record", "replay"] {
        let (ok, out, _) = run(&["events", command, "--help"]);
        assert!(ok && out.contains("Example"), "{command} teaches: {out}");
    }
}
