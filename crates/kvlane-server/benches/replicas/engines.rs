//! Engines that publish chains, and an HTTP client that keeps its connection: what the measurements share.

use kvlane_index::BlockSize;
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_server::indexer::{Indexer, IndexerConfig, start};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Tokens in a block.
pub const BLOCK: usize = 4;
/// Blocks of a chain, which is one event.
pub const CHAIN: usize = 512;
/// Batches sent before others get a turn: a publisher drops what a slow subscriber has no room for, which a replay then repairs.
const BURST: usize = 16;

type Retained = Arc<Mutex<Vec<(u64, Arc<Vec<u8>>)>>>;

/// One rank's publisher.
pub struct Engine {
    ports: (u16, u16),
    retained: Retained,
    pub chains: usize,
    pub rank: usize,
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
    pub async fn start(rank: usize, chains: usize) -> Self {
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

    pub fn registration(&self) -> Value {
        json!({
            "instance_id": self.rank, "model_name": "m", "block_size": BLOCK,
            "endpoint": format!("tcp://127.0.0.1:{}", self.ports.0),
            "replay_endpoint": format!("tcp://127.0.0.1:{}", self.ports.1),
        })
    }

    /// All but the last batch.
    pub fn forget(&self) {
        let mut retained = self.retained.lock().unwrap();
        let from = retained.len() - 1;
        retained.drain(..from);
    }
}

/// One kept-alive connection.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub async fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::new(stream))
    }

    pub async fn ask(&mut self, method: &str, path: &str, body: &str) -> String {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
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

    pub async fn pairs(&mut self) -> u64 {
        let text = self.ask("GET", "/metrics", "").await;
        let line = text.lines().find(|line| line.starts_with("kvlane_indexer_pairs{"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }
}

/// The block hashes of a chain.
pub fn hashes(engine: &Engine, chain: usize) -> Vec<u64> {
    let mut hashes = Vec::new();
    let size = BlockSize::new(BLOCK as u32).unwrap();
    prompt_hashes(&tokens(engine.rank, chain, engine.chains), size, &Namespace::default(), &mut hashes);
    hashes.iter().map(|hash| hash.0).collect()
}

/// A question that each rank's chain answers alike, and the answer.
pub fn question(engine: &Engine, chain: usize) -> (String, String) {
    let hashes: Vec<i64> = hashes(engine, chain).iter().map(|h| h.cast_signed()).collect();
    let expected = format!("{{\"scores\":{{\"{}\":{{\"0\":{}}}}}", engine.rank, CHAIN * BLOCK);
    (json!({"block_hashes": hashes, "model_name": "m"}).to_string(), expected)
}

/// Median and 99th percentile of what was measured, in microseconds.
pub fn summary(mut us: Vec<u64>) -> String {
    us.sort_unstable();
    match us.len() {
        0 => "no questions".to_owned(),
        n => format!("p50 {} us, p99 {} us of {n}", us[n / 2], us[n * 99 / 100]),
    }
}

pub async fn begin(peers: Vec<String>) -> (Indexer, CancellationToken) {
    let mut config = IndexerConfig::new("127.0.0.1:0".parse().unwrap());
    config.peers = peers;
    let stop = CancellationToken::new();
    (start(config, stop.clone()).await.unwrap(), stop)
}

pub async fn until_pairs(client: &mut Client, pairs: u64) {
    let began = Instant::now();
    while client.pairs().await < pairs {
        assert!(began.elapsed() < Duration::from_secs(600), "it never holds {pairs} pairs");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
