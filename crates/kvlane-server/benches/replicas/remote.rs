//! Questions of remote schedulers: prompts of 512 blocks.
//!
//! gRPC at a fixed rate, whatever the answers take: a thread of its own sends a question every 200 us, single calls or one stream, and each answer's
//! time counts from when its question was handed over, so that a slow answer holds up none of the measurement. Then `/query_by_hash` as fast as
//! a few connections go, beside the reference's own service in turns, if `REFERENCE_INDEXER` names its binary (`bench/opponents/indexer`). Every answer is
//! checked.

use crate::engines::{CHAIN, Client, Engine, begin, hashes, question, summary, until_pairs};
use futures_util::StreamExt;
use kvlane_index::hash::Scheme;
use kvlane_server::grpc::v1::index_client::IndexClient;
use kvlane_server::grpc::v1::{OverlapRequest, OverlapResponse};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

/// Questions a second over gRPC.
const RATE: u64 = 5_000;
/// Seconds of each measurement.
const SECONDS: u64 = 5;
/// Different prompts.
const PROMPTS: usize = 256;
/// Connections that ask over HTTP at a time.
const CONNECTIONS: usize = 4;
/// Measurements of each kind.
const ROUNDS: usize = 3;

/// Prompts as hashes, with the rank that holds each.
type Prompts = Arc<Vec<(Vec<u64>, u64)>>;

pub async fn measure(chains: usize, ranks: usize) {
    let (indexer, stop) = begin(Vec::new()).await;
    let mut reference = Reference::start();
    let mut client = Client::connect(indexer.address()).await;
    let mut engines = Vec::new();
    for rank in 0..ranks {
        let engine = Engine::start(rank, chains).await;
        let registration = engine.registration().to_string();
        client.ask("POST", "/register", &registration).await;
        if let Some(reference) = &mut reference {
            reference.connect().await.ask("POST", "/register", &registration).await;
        }
        engines.push(engine);
    }
    let all = (chains * ranks * CHAIN) as u64;
    until_pairs(&mut client, all).await;
    println!("{all} pairs of {ranks} ranks");
    let prompts: Prompts = Arc::new(
        (0..PROMPTS).map(|i| (hashes(&engines[i % ranks], i * 31 % chains), (i % ranks) as u64)).collect(),
    );
    for _ in 0..ROUNDS {
        println!("gRPC, single calls, {RATE}/s: {}", paced(indexer.address(), &prompts, false).await);
        println!("gRPC, one stream,   {RATE}/s: {}", paced(indexer.address(), &prompts, true).await);
    }
    let questions: Arc<Vec<(String, String)>> =
        Arc::new((0..PROMPTS).map(|i| question(&engines[i % ranks], i * 31 % chains)).collect());
    for _ in 0..ROUNDS {
        println!("/query_by_hash, kvlane:    {}", flood(indexer.address(), &questions).await);
        if let Some(reference) = &mut reference {
            println!("/query_by_hash, reference: {}", flood(reference.address, &questions).await);
        }
    }
    drop(client);
    stop.cancel();
    indexer.ended().await;
}

fn asked(prompts: &Prompts, tag: u64) -> OverlapRequest {
    OverlapRequest {
        tag,
        model: "m".to_owned(),
        routing_group: String::new(),
        scheme: Scheme::Reference.id(),
        block_hashes: prompts[tag as usize % prompts.len()].0.clone(),
    }
}

fn check(prompts: &Prompts, answer: &OverlapResponse) {
    let (blocks, holder) = &prompts[answer.tag as usize % prompts.len()];
    let held: Vec<(u64, u32)> =
        answer.ranks.iter().filter(|r| r.device > 0).map(|r| (r.instance, r.device)).collect();
    assert_eq!(held, [(*holder, blocks.len() as u32)], "{}", answer.error);
}

/// Asks at [`RATE`] for [`SECONDS`].
async fn paced(to: SocketAddr, prompts: &Prompts, stream: bool) -> String {
    let endpoint = Endpoint::from_shared(format!("http://{to}")).unwrap().tcp_nodelay(true);
    let mut client = IndexClient::new(endpoint.connect().await.unwrap());
    // Nothing waits here: the rate does not depend on the answers.
    let (send, mut questions) = mpsc::unbounded_channel::<(u64, Instant)>();
    let pacing = std::thread::spawn(move || {
        let began = Instant::now();
        for tag in 0..RATE * SECONDS {
            let due = began + Duration::from_nanos(tag * 1_000_000_000 / RATE);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            send.send((tag, Instant::now())).unwrap();
        }
    });
    let mut us = Vec::new();
    if stream {
        let (times, mut sent) = mpsc::unbounded_channel();
        let from = Arc::clone(prompts);
        let questions = tokio_stream(questions).map(move |(tag, at)| {
            times.send(at).unwrap();
            asked(&from, tag)
        });
        let mut answers = client.overlap_stream(questions).await.unwrap().into_inner();
        while let Some(answer) = answers.message().await.unwrap() {
            us.push(sent.recv().await.unwrap().elapsed().as_micros() as u64);
            check(prompts, &answer);
        }
    } else {
        let mut running = JoinSet::new();
        while let Some((tag, at)) = questions.recv().await {
            let (mut client, prompts) = (client.clone(), Arc::clone(prompts));
            running.spawn(async move {
                let answer = client.overlap(asked(&prompts, tag)).await.unwrap().into_inner();
                let took = at.elapsed().as_micros() as u64;
                check(&prompts, &answer);
                took
            });
            while let Some(done) = running.try_join_next() {
                us.push(done.unwrap());
            }
        }
        us.extend(running.join_all().await);
    }
    pacing.join().unwrap();
    summary(us)
}

fn tokio_stream<T: Send + 'static>(
    mut from: mpsc::UnboundedReceiver<T>,
) -> impl futures_util::Stream<Item = T> + Send {
    futures_util::stream::poll_fn(move |context| from.poll_recv(context))
}

/// Asks as fast as [`CONNECTIONS`] go for [`SECONDS`].
async fn flood(to: SocketAddr, questions: &Arc<Vec<(String, String)>>) -> String {
    let mut running = JoinSet::new();
    let began = Instant::now();
    for connection in 0..CONNECTIONS {
        let questions = Arc::clone(questions);
        running.spawn(async move {
            let mut client = Client::connect(to).await;
            let mut us = Vec::new();
            while began.elapsed().as_secs() < SECONDS {
                let (body, expected) = &questions[(us.len() * CONNECTIONS + connection) % questions.len()];
                let asked = Instant::now();
                let answer = client.ask("POST", "/query_by_hash", body).await;
                us.push(asked.elapsed().as_micros() as u64);
                assert!(answer.starts_with(expected), "{answer}");
            }
            us
        });
    }
    let us: Vec<u64> = running.join_all().await.into_iter().flatten().collect();
    format!("{} a second, {}", us.len() as u64 * 1_000 / began.elapsed().as_millis() as u64, summary(us))
}

/// The reference's service as a process; ended with the bench.
struct Reference {
    process: Child,
    address: SocketAddr,
}

impl Reference {
    fn start() -> Option<Self> {
        let binary = std::env::var_os("REFERENCE_INDEXER")?;
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let process = Command::new(binary)
            .arg(address.port().to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self { process, address })
    }

    /// As soon as it listens.
    async fn connect(&self) -> Client {
        while tokio::net::TcpStream::connect(self.address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Client::connect(self.address).await
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
