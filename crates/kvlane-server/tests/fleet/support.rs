//! An engine made of nothing but its surface: the HTTP routes that a probe asks, a PUB socket and a ROUTER for replays.
//!
//! The ZeroMQ side is the crate `zeromq`, which shares no code with the client under test.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a failure here fails the test that called")]

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use kvlane_index::{BlockHash, BlockSize, Overlaps, Worker, hash};
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::{Fleet, FleetConfig, FleetView, Instance, start};
use kvlane_server::ingest::RankStats;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// What one engine says about itself.
#[derive(Clone)]
pub struct Says {
    pub models: Value,
    pub version: Value,
    pub metrics: String,
    /// `None`: the route does not exist.
    pub sources: Option<Value>,
    pub server_info: Option<Value>,
    pub health: StatusCode,
}

/// vLLM with one model, `block_size`, and no events yet.
pub fn vllm(model: &str, block_size: u32, started_s: f64) -> Says {
    Says {
        models: json!({"object": "list", "data": [
            {"id": model, "owned_by": "vllm", "root": format!("/models/{model}"), "parent": null, "max_model_len": 4096},
            {"id": format!("{model}-lora"), "owned_by": "vllm", "root": "/lora", "parent": model, "max_model_len": null},
        ]}),
        version: json!({"version": "0.32.0"}),
        metrics: format!(
            "# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {started_s:e}\n\
             vllm:cache_config_info{{block_size=\"{block_size}\",engine=\"0\",hash_block_size=\"None\",num_gpu_blocks=\"129\"}} 1.0\n\
             vllm:num_requests_running{{engine=\"0\",model_name=\"{model}\"}} 0.0\n"
        ),
        sources: Some(json!({})),
        server_info: None,
        health: StatusCode::OK,
    }
}

/// Sequence numbers and payloads that the replay socket has.
type Retained = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// One rank's publisher: PUB and ROUTER.
pub struct Rank {
    pub events_port: u16,
    pub replay_port: u16,
    topic: &'static str,
    send: mpsc::UnboundedSender<(Vec<Vec<u8>>, oneshot::Sender<()>)>,
    retained: Retained,
    next: u64,
    tasks: JoinSet<()>,
}

impl Rank {
    pub async fn start(topic: &'static str, events_port: u16, replay_port: u16) -> Self {
        let mut tasks = JoinSet::new();
        let mut publisher = PubSocket::new();
        let events_port = bind(&mut publisher, events_port).await;
        let mut router = RouterSocket::new();
        let replay_port = bind(&mut router, replay_port).await;
        let (send, mut outgoing) = mpsc::unbounded_channel::<(Vec<Vec<u8>>, oneshot::Sender<()>)>();
        tasks.spawn(async move {
            while let Some((frames, done)) = outgoing.recv().await {
                publisher.send(message(&frames)).await.unwrap();
                let _ = done.send(());
            }
        });
        let retained = Retained::default();
        let kept = Arc::clone(&retained);
        tasks.spawn(async move {
            loop {
                let Ok(request) = router.recv().await else { continue };
                let frames = request.into_vec();
                let [peer, delimiter, from] = &frames[..] else { continue };
                if !delimiter.is_empty() {
                    continue;
                }
                let from = u64::from_be_bytes(from[..].try_into().unwrap());
                let found: Vec<_> =
                    kept.lock().unwrap().iter().filter(|(seq, _)| *seq >= from).cloned().collect();
                for (seq, payload) in found.into_iter().chain([(u64::MAX, Vec::new())]) {
                    let name = if payload.is_empty() { "" } else { topic };
                    let frames =
                        [peer.to_vec(), Vec::new(), name.into(), seq.to_be_bytes().to_vec(), payload];
                    if router.send(message(&frames)).await.is_err() {
                        break;
                    }
                }
            }
        });
        Self { events_port, replay_port, topic, send, retained, next: 0, tasks }
    }

    /// Publishes one batch.
    pub async fn publish(&mut self, events: &[Event]) {
        let payload = batch(events);
        let seq = self.keep(payload.clone());
        self.send(vec![self.topic.into(), seq.to_be_bytes().to_vec(), payload]).await;
    }

    /// Publishes a batch that no subscriber gets; the replay socket has it.
    pub fn publish_and_lose(&mut self, events: &[Event]) {
        self.keep(batch(events));
    }

    /// Sends frames as they are.
    pub async fn send(&mut self, frames: Vec<Vec<u8>>) {
        let (done, wait) = oneshot::channel();
        self.send.send((frames, done)).unwrap();
        wait.await.unwrap();
    }

    /// Makes the replay socket forget all but the last `count` batches.
    pub fn retain_last(&mut self, count: usize) {
        let mut retained = self.retained.lock().unwrap();
        let from = retained.len().saturating_sub(count);
        retained.drain(..from);
    }

    /// Gives the replay socket a batch under any number.
    pub fn record(&mut self, seq: u64, payload: Vec<u8>) {
        self.retained.lock().unwrap().push((seq, payload));
    }

    fn keep(&mut self, payload: Vec<u8>) -> u64 {
        let seq = self.next;
        self.next += 1;
        self.retained.lock().unwrap().push((seq, payload));
        seq
    }

    /// Closes both sockets, as a killed process does; returns what could have been replayed.
    pub async fn stop(mut self) -> Vec<(u64, Vec<u8>)> {
        self.tasks.shutdown().await;
        self.retained.lock().unwrap().clone()
    }

    pub fn source(&self) -> Value {
        json!({
            "publisher": "zmq", "endpoint": format!("tcp://*:{}", self.events_port),
            "replay_endpoint": format!("tcp://*:{}", self.replay_port), "topic": self.topic,
        })
    }
}

async fn bind(socket: &mut impl Socket, port: u16) -> u16 {
    let mut last = None;
    // The port of an earlier life may take a moment to be free.
    for _ in 0..200 {
        match socket.bind(&format!("tcp://127.0.0.1:{port}")).await {
            Ok(zeromq::Endpoint::Tcp(_, port)) => return port,
            Ok(other) => panic!("bound to {other}"),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("cannot bind {port}: {last:?}");
}

fn message(frames: &[Vec<u8>]) -> ZmqMessage {
    let frames: Vec<bytes::Bytes> = frames.iter().map(|f| f.clone().into()).collect();
    frames.try_into().unwrap()
}

/// The HTTP side.
pub struct Http {
    pub address: SocketAddr,
    tasks: JoinSet<()>,
}

impl Http {
    pub async fn start(says: Says, port: u16) -> Self {
        Self::start_with(says, port, Router::new()).await
    }

    /// With more routes.
    pub async fn start_with(says: Says, port: u16, more: Router) -> Self {
        let listener = loop {
            match TcpListener::bind(("127.0.0.1", port)).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let address = listener.local_addr().unwrap();
        let mut app = more
            .route("/v1/models", get(async move || axum::Json(says.models)))
            .route("/version", get(async move || axum::Json(says.version)))
            .route("/metrics", get(async move || says.metrics))
            .route("/health", get(async move || says.health));
        if let Some(sources) = says.sources {
            app = app.route("/kv_event_sources", get(async move || axum::Json(sources)));
        }
        if let Some(info) = says.server_info {
            app = app.route("/server_info", get(async move || axum::Json(info)));
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// A vLLM with one rank that publishes.
pub async fn publishing_vllm(model: &str, block_size: u32) -> (Http, Rank) {
    let rank = Rank::start("kv", 0, 0).await;
    let says = Says { sources: Some(json!({"0": rank.source()})), ..vllm(model, block_size, 1e9) };
    (Http::start(says, 0).await, rank)
}

/// What an engine may say, in the map form.
pub enum Event {
    Stored {
        hashes: Vec<u64>,
        parent: Option<u64>,
        tokens: Vec<u32>,
        block_size: u32,
        lora: Option<&'static str>,
    },
    Removed(Vec<u64>),
    Cleared,
}

/// A chain from the root: engine hashes `first..`, one for each whole block of `tokens`.
pub fn stored(first: u64, tokens: &[u32], block_size: u32) -> Event {
    let blocks = tokens.len() as u64 / u64::from(block_size);
    Event::Stored {
        hashes: (first..first + blocks).collect(),
        parent: None,
        tokens: tokens.to_vec(),
        block_size,
        lora: None,
    }
}

/// The payload of a batch.
pub fn batch(events: &[Event]) -> Vec<u8> {
    let mut out = Vec::new();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    rmp::encode::write_array_len(&mut out, 3).unwrap();
    rmp::encode::write_f64(&mut out, now.as_secs_f64()).unwrap();
    rmp::encode::write_array_len(&mut out, events.len() as u32).unwrap();
    for event in events {
        encode(event, &mut out);
    }
    rmp::encode::write_uint(&mut out, 0).unwrap();
    out
}

fn encode(event: &Event, out: &mut Vec<u8>) {
    use rmp::encode::{write_array_len, write_map_len, write_nil, write_str, write_uint};
    let hashes = |out: &mut Vec<u8>, list: &[u64]| {
        write_str(out, "block_hashes").unwrap();
        write_array_len(out, list.len() as u32).unwrap();
        list.iter().for_each(|hash| {
            write_uint(out, *hash).unwrap();
        });
    };
    match event {
        Event::Stored { hashes: list, parent, tokens, block_size, lora } => {
            write_map_len(out, 6).unwrap();
            write_str(out, "type").unwrap();
            write_str(out, "BlockStored").unwrap();
            hashes(out, list);
            write_str(out, "parent_block_hash").unwrap();
            match parent {
                Some(hash) => drop(write_uint(out, *hash).unwrap()),
                None => write_nil(out).unwrap(),
            }
            write_str(out, "token_ids").unwrap();
            write_array_len(out, tokens.len() as u32).unwrap();
            for token in tokens {
                write_uint(out, u64::from(*token)).unwrap();
            }
            write_str(out, "block_size").unwrap();
            write_uint(out, u64::from(*block_size)).unwrap();
            write_str(out, "lora_name").unwrap();
            match lora {
                Some(name) => write_str(out, name).unwrap(),
                None => write_nil(out).unwrap(),
            }
        }
        Event::Removed(list) => {
            write_map_len(out, 2).unwrap();
            write_str(out, "type").unwrap();
            write_str(out, "BlockRemoved").unwrap();
            hashes(out, list);
        }
        Event::Cleared => {
            write_map_len(out, 1).unwrap();
            write_str(out, "type").unwrap();
            write_str(out, "AllBlocksCleared").unwrap();
        }
    }
}

/// A running fleet that is stopped at the end of the test.
pub struct Running {
    pub fleet: Fleet,
    stop: CancellationToken,
}

impl Running {
    /// With quick probes.
    pub fn start(workers: &[String]) -> Self {
        let specs: Vec<WorkerSpec> = workers.iter().map(|w| w.parse().unwrap()).collect();
        let mut config = FleetConfig::new(specs);
        config.probe_interval = Duration::from_millis(100);
        let stop = CancellationToken::new();
        Self { fleet: start(&config, &stop), stop }
    }

    /// Waits for a view like this.
    pub async fn until(&self, what: &str, mut holds: impl FnMut(&FleetView) -> bool) -> Arc<FleetView> {
        let mut changed = self.fleet.changed();
        let wait = async {
            loop {
                let view = self.fleet.snapshot();
                if holds(&view) {
                    return view;
                }
                changed.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(Duration::from_secs(20), wait).await {
            Ok(view) => view,
            Err(_) => panic!("waited in vain until {what}; now {:#?}", self.fleet.snapshot()),
        }
    }

    /// Waits until this rank's overlap with a prompt is `blocks`.
    pub async fn until_overlap(&self, worker: Worker, tokens: &[u32], blocks: u32) {
        let mut last = None;
        for _ in 0..2000 {
            last = self.overlap(worker, tokens);
            if last == Some(blocks) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{worker} holds {last:?} blocks, not {blocks}; {:#?}", self.fleet.stats());
    }

    /// Waits for figures like these.
    pub async fn until_stats(&self, what: &str, holds: impl Fn(&[(Worker, RankStats)]) -> bool) {
        for _ in 0..2000 {
            if holds(&self.fleet.stats()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("waited in vain until {what}; now {:#?}", self.fleet.stats());
    }

    /// Confirmed leading blocks at this rank; `None` if it has no index.
    pub fn overlap(&self, worker: Worker, tokens: &[u32]) -> Option<u32> {
        let view = self.fleet.snapshot();
        let partition = view.instance(worker.instance)?.partition.clone()?;
        let mut overlaps = Overlaps::default();
        partition.index.overlap(&hashes(tokens, partition.block_size), &mut overlaps);
        Some(overlaps.get(worker).map_or(0, |o| o.device))
    }

    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), self.fleet.stopped()).await.expect("the fleet stops");
    }
}

pub fn hashes(tokens: &[u32], block_size: BlockSize) -> Vec<BlockHash> {
    let mut out = Vec::new();
    hash::prompt_hashes(tokens, block_size, &hash::Namespace::default(), &mut out);
    out
}

/// Whether the first rank of an instance is in this state of trust.
pub fn trusts(instance: &Instance, name: &str) -> bool {
    instance.ranks.first().is_some_and(|rank| rank.trust.name() == name)
}
