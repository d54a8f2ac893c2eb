//! How long a new replica takes to know what its peer knows, and what questions cost meanwhile and afterwards.
//!
//! One process plays all parts over loopback sockets: engines (PUB and ROUTER) that publish chains until an indexer holds `PAIRS` pairs and then
//! forget all but their last batch; that indexer; and a second one that is started with the first as its peer. A client asks the first one all
//! the time over one connection. Printed: the time until the second one is in step with all ranks, whether it then answers alike, and
//! latencies of `/query_by_hash` before, during and after.
//!
//! `cargo bench -p kvlane-server --bench replicas -- [pairs] [ranks]`

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench: what fails ends it, and its result is what it prints"
)]

use kvlane_index::BlockSize;
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_server::indexer::{Indexer, IndexerConfig, start};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Tokens in a block.
const BLOCK: usize = 4;
/// Blocks of a chain, which is one event.
const CHAIN: usize = 512;
/// Batches sent before others get a turn: a publisher drops what a slow subscriber has no room for, which a replay then repairs.
const BURST: usize = 16;

type Retained = Arc<Mutex<Vec<(u64, Arc<Vec<u8>>)>>>;

/// One rank's publisher.
struct Engine {
    ports: (u16, u16),
    retained: Retained,
    chains: usize,
    rank: usize,
}

fn port(endpoint: zeromq::Endpoint) -> u16 {
    match endpoint {
        zeromq::Endpoint::Tcp(_, port) => port,
        other => panic!("bound to {other}"),
    }
}

fn message(frames: Vec<Vec<u8>>) -> ZmqMessage {
    let frames: Vec<bytes::Bytes> = frames.into_iter().map(Into::into).collect();
    frames.try_into().unwrap()
}

/// The tokens of a chain; no two chains have one in common.
fn tokens(rank: usize, chain: usize, chains: usize) -> Vec<u32> {
    let first = ((rank * chains + chain) * CHAIN * BLOCK) as u32;
    (first..first + (CHAIN * BLOCK) as u32).collect()
}

fn batch(rank: usize, chain: usize, chains: usize) -> Vec<u8> {
    use rmp::encode::{write_array_len, write_f64, write_map_len, write_nil, write_str, write_uint};
    let mut out = Vec::new();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    write_array_len(&mut out, 2).unwrap();
    write_f64(&mut out, now.as_secs_f64()).unwrap();
    write_array_len(&mut out, 1).unwrap();
    write_map_len(&mut out, 5).unwrap();
    write_str(&mut out, "type").unwrap();
    write_str(&mut out, "BlockStored").unwrap();
    write_str(&mut out, "block_hashes").unwrap();
    write_array_len(&mut out, CHAIN as u32).unwrap();
    for at in 0..CHAIN {
        // Spread over 64 bits, as engines' hashes are.
        write_uint(&mut out, ((chain * CHAIN + at) as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).unwrap();
    }
    write_str(&mut out, "parent_block_hash").unwrap();
    write_nil(&mut out).unwrap();
    write_str(&mut out, "token_ids").unwrap();
    write_array_len(&mut out, (CHAIN * BLOCK) as u32).unwrap();
    for token in tokens(rank, chain, chains) {
        write_uint(&mut out, u64::from(token)).unwrap();
    }
    write_str(&mut out, "block_size").unwrap();
    write_uint(&mut out, BLOCK as u64).unwrap();
    out
}

impl Engine {
    async fn start(rank: usize, chains: usize) -> Self {
        let mut publisher = PubSocket::new();
        let events = port(publisher.bind("tcp://127.0.0.1:0").await.unwrap());
        let mut router = RouterSocket::new();
        let replay = port(router.bind("tcp://127.0.0.1:0").await.unwrap());
        let retained = Retained::default();
        let kept = Arc::clone(&retained);
        tokio::spawn(async move {
            loop {
                let Ok(request) = router.recv().await else { continue };
                let frames = request.into_vec();
                let from = u64::from_be_bytes(frames[2][..].try_into().unwrap());
                let found: Vec<_> =
                    kept.lock().unwrap().iter().filter(|(seq, _)| *seq >= from).cloned().collect();
                let end = (u64::MAX, Arc::new(Vec::new()));
                for (seq, payload) in found.into_iter().chain([end]) {
                    let frames = vec![
                        frames[0].to_vec(),
                        Vec::new(),
                        Vec::new(),
                        seq.to_be_bytes().to_vec(),
                        payload.to_vec(),
                    ];
                    if router.send(message(frames)).await.is_err() {
                        break;
                    }
                }
            }
        });
        let kept = Arc::clone(&retained);
        tokio::spawn(async move {
            for chain in 0..chains {
                let payload = Arc::new(batch(rank, chain, chains));
                kept.lock().unwrap().push((chain as u64, Arc::clone(&payload)));
                let frames = vec![Vec::new(), (chain as u64).to_be_bytes().to_vec(), payload.to_vec()];
                publisher.send(message(frames)).await.unwrap();
                if chain % BURST == 0 {
                    tokio::task::yield_now().await;
                }
            }
            // The socket lives as long as the process.
            std::future::pending::<()>().await;
            drop(publisher);
        });
        Self { ports: (events, replay), retained, chains, rank }
    }

    fn registration(&self) -> Value {
        json!({
            "instance_id": self.rank, "model_name": "m", "block_size": BLOCK,
            "endpoint": format!("tcp://127.0.0.1:{}", self.ports.0),
            "replay_endpoint": format!("tcp://127.0.0.1:{}", self.ports.1),
        })
    }

    /// All but the last batch.
    fn forget(&self) {
        let mut retained = self.retained.lock().unwrap();
        let from = retained.len() - 1;
        retained.drain(..from);
    }
}

/// One kept-alive connection.
struct Client(BufReader<TcpStream>);

impl Client {
    async fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    async fn ask(&mut self, method: &str, path: &str, body: &str) -> String {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        self.0.get_mut().write_all(request.as_bytes()).await.unwrap();
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            self.0.read_line(&mut line).await.unwrap();
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.unwrap();
        String::from_utf8(body).unwrap()
    }

    async fn pairs(&mut self) -> u64 {
        let text = self.ask("GET", "/metrics", "").await;
        let line = text.lines().find(|line| line.starts_with("kvlane_indexer_pairs{"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }
}

/// A question that each rank's chain answers alike, and the answer.
fn question(engine: &Engine, chain: usize) -> (String, String) {
    let mut hashes = Vec::new();
    let size = BlockSize::new(BLOCK as u32).unwrap();
    prompt_hashes(&tokens(engine.rank, chain, engine.chains), size, &Namespace::default(), &mut hashes);
    let hashes: Vec<i64> = hashes.iter().map(|h| h.0.cast_signed()).collect();
    let expected = format!("{{\"scores\":{{\"{}\":{{\"0\":{}}}}}", engine.rank, CHAIN * BLOCK);
    (json!({"block_hashes": hashes, "model_name": "m"}).to_string(), expected)
}

/// Median and 99th percentile of what was measured, in microseconds.
fn summary(mut us: Vec<u64>) -> String {
    us.sort_unstable();
    match us.len() {
        0 => "no questions".to_owned(),
        n => format!("p50 {} us, p99 {} us of {n}", us[n / 2], us[n * 99 / 100]),
    }
}

async fn begin(peers: Vec<String>) -> (Indexer, CancellationToken) {
    let mut config = IndexerConfig::new("127.0.0.1:0".parse().unwrap());
    config.peers = peers;
    let stop = CancellationToken::new();
    (start(config, stop.clone()).await.unwrap(), stop)
}

async fn until_pairs(client: &mut Client, pairs: u64) {
    let began = Instant::now();
    while client.pairs().await < pairs {
        assert!(began.elapsed() < Duration::from_secs(600), "it never holds {pairs} pairs");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::main]
async fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let pairs = arguments.first().copied().unwrap_or(1_000_000);
    let ranks = arguments.get(1).copied().unwrap_or(16);
    let chains = pairs / ranks / CHAIN;
    let all = (chains * ranks * CHAIN) as u64;

    let (old, stop_old) = begin(Vec::new()).await;
    let mut client = Client::connect(old.address()).await;
    let mut engines = Vec::new();
    let began = Instant::now();
    for rank in 0..ranks {
        let engine = Engine::start(rank, chains).await;
        client.ask("POST", "/register", &engine.registration().to_string()).await;
        engines.push(engine);
    }
    until_pairs(&mut client, all).await;
    println!("{all} pairs of {ranks} ranks heard in {:.1} s", began.elapsed().as_secs_f64());
    engines.iter().for_each(Engine::forget);

    let mut alone = Vec::new();
    for i in 0..2_000 {
        let (body, expected) = question(&engines[i % ranks], i * 7 % chains);
        let asked = Instant::now();
        let answer = client.ask("POST", "/query_by_hash", &body).await;
        alone.push(asked.elapsed().as_micros() as u64);
        assert!(answer.starts_with(&expected), "{answer}");
    }
    println!("one client, {CHAIN} blocks, quiet: {}", summary(alone));

    let questions: Vec<(String, String)> =
        (0..256).map(|i| question(&engines[i % ranks], i * 31 % chains)).collect();
    let done = Arc::new(AtomicBool::new(false));
    let (until, address, asked) = (Arc::clone(&done), old.address(), questions.clone());
    let asking = tokio::spawn(async move {
        let mut client = Client::connect(address).await;
        let mut us = Vec::new();
        while !until.load(Ordering::Relaxed) {
            let (body, expected) = &asked[us.len() % asked.len()];
            let asked = Instant::now();
            let answer = client.ask("POST", "/query_by_hash", body).await;
            us.push(asked.elapsed().as_micros() as u64);
            assert!(answer.starts_with(expected), "{answer}");
        }
        us
    });
    let began = Instant::now();
    let (new, stop_new) = begin(vec![format!("http://{}", old.address())]).await;
    let mut fresh = Client::connect(new.address()).await;
    until_pairs(&mut fresh, all).await;
    let took = began.elapsed();
    done.store(true, Ordering::Relaxed);
    println!("a new replica holds all {all} pairs after {:.2} s", took.as_secs_f64());
    println!("the peer answers meanwhile: {}", summary(asking.await.unwrap()));
    for (body, expected) in &questions {
        let answer = fresh.ask("POST", "/query_by_hash", body).await;
        assert!(answer.starts_with(expected), "{answer}");
    }
    println!("and the replica answers {} questions alike", questions.len());
    drop((client, fresh));
    stop_new.cancel();
    stop_old.cancel();
    new.ended().await;
    old.ended().await;
}
