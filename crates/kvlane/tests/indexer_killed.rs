//! `kvlane indexer` is killed again and again, at any moment, and never claims what its engine does not hold.
//!
//! The engine here forgets all but its last batches, so that what an earlier life of the indexer knew can come from its state directory only. After
//! each life: nothing is claimed that is not held; and where the indexer says that it is in step, all that is held is claimed.

#![expect(clippy::panic, reason = "a failure in a helper fails the test that called")]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

const BLOCK: usize = 4;
/// Batches that the engine can replay.
const RETAINED: usize = 150;
const LIVES: u64 = 8;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

type Batches = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// A publisher, and what it holds: blocks of each prompt from its root.
struct Engine {
    publisher: PubSocket,
    ports: (u16, u16),
    retained: Batches,
    next: u64,
    held: BTreeMap<u32, usize>,
}

fn port(endpoint: zeromq::Endpoint) -> u16 {
    match endpoint {
        zeromq::Endpoint::Tcp(_, port) => port,
        other => panic!("bound to {other}"),
    }
}

fn message(frames: Vec<Vec<u8>>) -> ZmqMessage {
    let frames: Vec<bytes::Bytes> = frames.into_iter().map(Into::into).collect();
    frames.try_into().expect("there are frames")
}

impl Engine {
    async fn start() -> Self {
        let mut publisher = PubSocket::new();
        let events = port(publisher.bind("tcp://127.0.0.1:0").await.expect("a free port"));
        let mut router = RouterSocket::new();
        let replay = port(router.bind("tcp://127.0.0.1:0").await.expect("a free port"));
        let retained = Batches::default();
        let kept = Arc::clone(&retained);
        tokio::spawn(async move {
            loop {
                let Ok(request) = router.recv().await else { continue };
                let frames = request.into_vec();
                let [peer, _, from] = &frames[..] else { continue };
                let from = u64::from_be_bytes(from[..].try_into().expect("8 bytes"));
                let found: Vec<_> = kept
                    .lock()
                    .expect("not poisoned")
                    .iter()
                    .filter(|(seq, _)| *seq >= from)
                    .cloned()
                    .collect();
                for (seq, payload) in found.into_iter().chain([(u64::MAX, Vec::new())]) {
                    let frames =
                        vec![peer.to_vec(), Vec::new(), Vec::new(), seq.to_be_bytes().to_vec(), payload];
                    if router.send(message(frames)).await.is_err() {
                        break;
                    }
                }
            }
        });
        Self { publisher, ports: (events, replay), retained, next: 0, held: BTreeMap::new() }
    }

    /// One more block of a prompt, or its last one gone.
    async fn step(&mut self, rng: &mut Rng) {
        let prompt = rng.below(40) as u32;
        let held = self.held.entry(prompt).or_default();
        let name = |at: usize| u64::from(prompt) * 1000 + at as u64;
        let mut event = Vec::new();
        if *held > 0 && rng.below(3) == 0 {
            *held -= 1;
            event.push(0x82);
            text(&mut event, "type");
            text(&mut event, "BlockRemoved");
            text(&mut event, "block_hashes");
            event.push(0x91);
            number(&mut event, name(*held));
        } else {
            event.push(0x85);
            text(&mut event, "type");
            text(&mut event, "BlockStored");
            text(&mut event, "block_hashes");
            event.push(0x91);
            number(&mut event, name(*held));
            text(&mut event, "parent_block_hash");
            match *held {
                0 => event.push(0xc0),
                n => number(&mut event, name(n - 1)),
            }
            text(&mut event, "token_ids");
            event.push(0x90 | BLOCK as u8);
            for token in &tokens(prompt)[*held * BLOCK..][..BLOCK] {
                number(&mut event, u64::from(*token));
            }
            text(&mut event, "block_size");
            event.push(BLOCK as u8);
            *held += 1;
        }
        self.publish(&event).await;
    }

    /// Everything gone at once, after which all that it holds is known again.
    async fn clear(&mut self) {
        self.held.clear();
        let mut event = vec![0x81];
        text(&mut event, "type");
        text(&mut event, "AllBlocksCleared");
        self.publish(&event).await;
    }

    async fn publish(&mut self, event: &[u8]) {
        let mut payload = vec![0x92, 0xcb];
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        payload.extend(now.as_secs_f64().to_be_bytes());
        payload.push(0x91);
        payload.extend(event);
        let seq = self.next;
        self.next += 1;
        {
            let mut retained = self.retained.lock().expect("not poisoned");
            retained.push((seq, payload.clone()));
            let from = retained.len().saturating_sub(RETAINED);
            retained.drain(..from);
        }
        let frames = vec![b"kv".to_vec(), seq.to_be_bytes().to_vec(), payload];
        self.publisher.send(message(frames)).await.expect("publishing does not fail");
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(0xa0 | text.len() as u8);
    out.extend(text.bytes());
}

fn number(out: &mut Vec<u8>, number: u64) {
    out.push(0xcf);
    out.extend(number.to_be_bytes());
}

/// The first 64 blocks of a prompt.
fn tokens(prompt: u32) -> Vec<u32> {
    (prompt * 1000..prompt * 1000 + 64 * BLOCK as u32).collect()
}

/// One life of the indexer; killed, not asked, when it is dropped.
struct Life {
    process: Child,
    address: String,
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Life {
    fn begin(state: &std::path::Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_kvlane"))
            .args(["indexer", "--listen", "127.0.0.1:0", "--save-every", "1", "--state-dir"])
            .arg(state)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let mut lines = BufReader::new(process.stderr.take().expect("it is piped")).lines();
        let address = loop {
            let line = lines.next().expect("it says where it listens").expect("text");
            if let Some((_, rest)) = line.split_once("indexer listening address=") {
                break rest.split(' ').next().unwrap_or_default().to_owned();
            }
        };
        // Read to the end, or the process would wait for it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { process, address }
    }

    async fn post(&self, path: &str, body: &Value) -> Value {
        let mut stream = TcpStream::connect(&self.address).await.expect("it listens");
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).expect("JSON")
    }

    /// What it claims of a prompt, in blocks; and whether it says that it knows all.
    async fn claims(&self, prompt: u32) -> (usize, bool) {
        let answer = self.post("/v1/overlap", &json!({"model_name": "m", "token_ids": tokens(prompt)})).await;
        let rank = &answer["ranks"][0];
        (rank["device"]["blocks"].as_u64().unwrap_or(0) as usize, rank["trust"] == "live")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_it_claims_nothing_false() {
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos()
            as u64;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let state = std::env::temp_dir().join(format!("kvlane-killed-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&state);
    let mut engine = Engine::start().await;
    let (events, replay) = engine.ports;
    let registration = json!({
        "instance_id": 1, "model_name": "m", "block_size": BLOCK,
        "endpoint": format!("tcp://127.0.0.1:{events}"), "replay_endpoint": format!("tcp://127.0.0.1:{replay}"),
    });
    let mut continued = 0;
    for life in 0..LIVES {
        let indexer = Life::begin(&state);
        indexer.post("/register", &registration).await;
        // Until it has heard something of the engine.
        let mut quiet = 0;
        for _ in 0..400 {
            let (claimed, live) = indexer.claims(0).await;
            quiet += u32::from(live || claimed > 0);
            if quiet > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let until = tokio::time::Instant::now() + Duration::from_millis(200 + rng.below(2000));
        while tokio::time::Instant::now() < until {
            engine.step(&mut rng).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Quiet now: what it says must be true once it has caught up.
        let mut wrong = Vec::new();
        for _ in 0..1000 {
            wrong.clear();
            for (prompt, held) in &engine.held {
                let (claimed, live) = indexer.claims(*prompt).await;
                if claimed > *held || (live && claimed != *held) {
                    wrong.push((*prompt, claimed, *held, live));
                }
            }
            if wrong.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(wrong.is_empty(), "life {life}, seed {seed}: (prompt, claimed, held, live) {wrong:?}");
        let live = indexer.claims(0).await.1;
        continued += u64::from(live);
        if life == LIVES - 1 {
            assert!(
                live,
                "seed {seed}: it was saved while the engine was quiet, and nothing is missing since"
            );
        } else if life == LIVES - 2 {
            // The last life finds what was saved of this quiet, which is all there is.
            engine.clear().await;
            for _ in 0..30 {
                engine.step(&mut rng).await;
            }
            tokio::time::sleep(Duration::from_millis(2500)).await;
        } else {
            // More happens after the kill, sometimes too much to be replayed.
            drop(indexer);
            for _ in 0..rng.below(RETAINED as u64) {
                engine.step(&mut rng).await;
            }
        }
    }
    let _ = std::fs::remove_dir_all(&state);
    println!("{continued} of {LIVES} lives were in step at their end");
}
