//! How many events does a router take in, from a publisher's socket into the index?
//!
//! * *Throughput*: one vLLM publisher on loopback with a full cache of 2,048 prompts of 32 blocks: each block is a `BlockStored` event of its own (map form,
//!   16 tokens of a 128k vocabulary, chained to its parent), and before each prompt one `BlockRemoved` names the 32 blocks of the prompt that makes
//!   room. 64 events a batch, and 1. The publisher is a compiled process of its own (`publisher.rs`) that waits rather than drops; its CPU is told
//!   apart. The clock runs from the first batch to the moment when the index has applied the last; the index is then asked for prompts that must be
//!   there and prompts that must not.
//! * *Start*: many publishers, each a recorded capture played in a loop, with 10,000 batches waiting in its replay buffer and live ones coming meanwhile.
//!   The clock runs from the start of the fleet until every rank is `live` with nothing left to catch up.
//!
//! Everything that the router does is in it: HTTP probes, sockets, decoding, hashing, the stream's state, lanes, the index. Two runtime threads and
//! one index thread, on two cores (with four or more, the router is bound to the first two and the publisher to the others, by `taskset`). CPU seconds
//! are the scheduler's (`schedstat`). Medians of some rounds, with half the range. Prints Markdown tables (`cargo xtask bench events` keeps them in
//! BENCHMARKS.md).
//!
//! `cargo bench -p kvlane --bench ingest [-- --quick]`

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic, reason = "a bench: what fails ends it")]
#![allow(unreachable_pub, missing_docs, reason = "modules of one bench")]

mod publisher;

use axum::Router;
use axum::routing::get;
use kvlane_index::{BlockSize, Overlaps, hash};
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::{Fleet, FleetConfig, Trust, start};
use publisher::{BLOCK, CYCLE, PROMPT, Prompt, TOPIC};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// The recording that is looped; blocks of 32 tokens, evictions.
const RECORDED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../kvlane-events/tests/captures/vllm-0.32.0/11-evict-duplicates-bytes-hash.jsonl"
);
/// vLLM's default `buffer_steps`.
const KEPT_BATCHES: u64 = 10_000;
/// Longer than this is a failure.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if args.first().is_some_and(|a| a == "publisher") {
        return publisher::main(&args[1..]);
    }
    let cores = std::thread::available_parallelism().unwrap().get();
    let bound = std::env::var_os("KVLANE_BENCH_BOUND").is_some();
    if cores >= 4 && !bound {
        // Before any thread is made.
        let mut again = Command::new("taskset");
        again.args(["-c", "0,1"]).arg(std::env::current_exe().unwrap()).args(&args);
        let status = again.env("KVLANE_BENCH_BOUND", (cores - 1).to_string()).status().expect("taskset");
        assert!(status.success());
        return;
    }
    let quick = args.iter().any(|a| a == "--quick");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let rounds = if quick { 1 } else { 5 };
    println!(
        "| events a batch | M events/s | M events per CPU second of the router | of it sockets, decoding, streams | of it the index | CPU of the \
         publisher, s per M events | MB/s | spread |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (per_batch, events) in [(64, 8_000_000), (1, 2_000_000)] {
        let events = if quick { events / 8 } else { events };
        let mut taken: Vec<Taken> =
            (0..rounds).map(|_| runtime.block_on(throughput(per_batch, events))).collect();
        taken.sort_by(|a, b| a.rate().total_cmp(&b.rate()));
        let (least, most) = (taken[0].rate(), taken[taken.len() - 1].rate());
        let median = &taken[taken.len() / 2];
        let millions = median.events as f64 / 1e6;
        println!(
            "| {per_batch} | {:.2} | {:.2} | {:.0} % | {:.0} % | {:.2} | {:.0} | {:.0} % |",
            median.rate(),
            millions / median.cpu.total(),
            100.0 * median.cpu.other / median.cpu.total(),
            100.0 * median.cpu.index / median.cpu.total(),
            median.publisher_s / millions,
            median.bytes as f64 / 1e6 / median.wall_s,
            100.0 * (most - least) / 2.0 / median.rate(),
        );
    }
    let streams = if quick { 20 } else { 100 };
    let mut starts: Vec<Started> = (0..rounds.min(3)).map(|_| runtime.block_on(start_of(streams))).collect();
    starts.sort_by(|a, b| a.wall_s.total_cmp(&b.wall_s));
    let median = &starts[starts.len() / 2];
    println!(
        "\n| streams | batches each | blocks stored and removed | all live after, s | CPU of the router, s | CPU of the publishers, s | range, s |"
    );
    println!("|---|---|---|---|---|---|---|");
    println!(
        "| {streams} | {KEPT_BATCHES} | {:.1} M | {:.1} | {:.1} | {:.1} | {:.1} to {:.1} |",
        median.blocks as f64 / 1e6,
        median.wall_s,
        median.cpu_s,
        median.publisher_s,
        starts[0].wall_s,
        starts[starts.len() - 1].wall_s
    );
}

/// CPU seconds of this process so far.
fn cpu_s() -> f64 {
    Cpu::now().total()
}

/// CPU seconds of the threads that write the index, and of all others.
#[derive(Clone, Copy)]
struct Cpu {
    index: f64,
    other: f64,
}

impl Cpu {
    fn now() -> Self {
        let mut sum = Self { index: 0.0, other: 0.0 };
        for task in std::fs::read_dir("/proc/self/task").expect("Linux") {
            let task = task.unwrap().path();
            let (Ok(name), Ok(stat)) =
                (std::fs::read_to_string(task.join("comm")), std::fs::read_to_string(task.join("schedstat")))
            else {
                continue;
            };
            let spent = stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9;
            *(if name.starts_with("kvlane-index") { &mut sum.index } else { &mut sum.other }) += spent;
        }
        sum
    }

    fn since(self, before: Self) -> Self {
        Self { index: self.index - before.index, other: self.other - before.other }
    }

    fn total(self) -> f64 {
        self.index + self.other
    }
}

struct Publishers {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Publishers {
    fn start(args: &[String]) -> Self {
        let this = std::env::current_exe().unwrap();
        let mut command = match std::env::var("KVLANE_BENCH_BOUND") {
            Ok(last) => {
                let mut command = Command::new("taskset");
                command.args(["-c", &format!("2-{last}")]).arg(this);
                command
            }
            Err(_) => Command::new(this),
        };
        command.arg("publisher").args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the publisher starts");
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the publisher is alive");
        line.trim().to_owned()
    }

    fn go(&mut self) {
        self.input.write_all(b"\n").expect("the publisher is alive");
    }

    fn end(self) {
        drop(self.input);
        let mut child = self.child;
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A vLLM that says where it publishes, and answers nothing else.
async fn engine(events_port: u16, replay_port: Option<u16>, block_size: usize) -> WorkerSpec {
    let models = json!({"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]});
    let metrics = format!(
        "process_start_time_seconds 1e9\nvllm:cache_config_info{{block_size=\"{block_size}\",engine=\"0\",num_gpu_blocks=\"65537\"}} 1.0\n"
    );
    let mut source =
        json!({"publisher": "zmq", "endpoint": format!("tcp://127.0.0.1:{events_port}"), "topic": TOPIC});
    if let Some(port) = replay_port {
        source["replay_endpoint"] = format!("tcp://127.0.0.1:{port}").into();
    }
    let app = Router::new()
        .route("/v1/models", get(async move || axum::Json(models)))
        .route("/version", get(async || axum::Json(json!({"version": "0.32.0"}))))
        .route("/metrics", get(async move || metrics))
        .route("/health", get(async || ()))
        .route("/kv_event_sources", get(async move || axum::Json(json!({"0": source}))));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}").parse().unwrap()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// One round.
struct Taken {
    events: usize,
    wall_s: f64,
    cpu: Cpu,
    publisher_s: f64,
    bytes: u64,
}

impl Taken {
    /// Million events a second.
    fn rate(&self) -> f64 {
        self.events as f64 / 1e6 / self.wall_s
    }
}

async fn throughput(per_batch: usize, wanted: usize) -> Taken {
    let batches = wanted / per_batch;
    let mut publisher = Publishers::start(&["live".into(), per_batch.to_string(), batches.to_string()]);
    let port = publisher.line().parse().unwrap();
    let stop = CancellationToken::new();
    let fleet = start(&FleetConfig::new(vec![engine(port, None, BLOCK).await]), &stop);
    until("the subscription is there", || fleet.stats().iter().any(|(_, s)| s.connected)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let events = publisher::events(per_batch, batches);
    let (began, before) = (Instant::now(), Cpu::now());
    publisher.go();
    until("all events are applied", || {
        let stats = fleet.stats();
        stats.iter().map(|(_, s)| s.stored_events + s.removed_events).sum::<u64>() >= events as u64
    })
    .await;
    let (wall_s, cpu) = (began.elapsed().as_secs_f64(), Cpu::now().since(before));
    let publisher_s = publisher.line().parse().unwrap();
    let stats = fleet.stats()[0].1.clone();
    assert_eq!((stats.gaps, stats.drops().count(), stats.applied.unknown), (0, 0, 0), "{stats:?}");
    check(&fleet, events);
    publisher.end();
    stop.cancel();
    fleet.stopped().await;
    Taken { events, wall_s, cpu, publisher_s, bytes: stats.bytes }
}

/// The last prompts are there, the ones that made room are not.
fn check(fleet: &Fleet, events: usize) {
    let in_first = CYCLE * PROMPT + CYCLE / 2;
    let last = match events.checked_sub(in_first) {
        None if events <= CYCLE / 2 * PROMPT => events / PROMPT,
        None => CYCLE / 2 + (events - CYCLE / 2 * PROMPT) / (PROMPT + 1),
        Some(rest) => rest / (PROMPT + 1),
    };
    let view = fleet.snapshot();
    let partition = view.instances[0].partition.clone().expect("it is attached");
    let held = |prompt: usize| {
        let mut hashes = Vec::new();
        let size = BlockSize::new(BLOCK as u32).unwrap();
        hash::prompt_hashes(
            &Prompt::new(prompt % CYCLE).tokens,
            size,
            &hash::Namespace::default(),
            &mut hashes,
        );
        let mut overlaps = Overlaps::default();
        partition.index.overlap(&hashes, &mut overlaps);
        overlaps.ranks.first().map_or(0, |overlap| overlap.device as usize)
    };
    for back in 1..100 {
        assert_eq!(held(last + CYCLE - back), PROMPT, "prompt {last} - {back} of {events} events");
        assert_eq!(held(last + CYCLE / 2 - back - 1), 0, "prompt {last} - {back} - half a cycle");
    }
}

/// One start.
struct Started {
    wall_s: f64,
    cpu_s: f64,
    publisher_s: f64,
    blocks: u64,
}

async fn start_of(streams: usize) -> Started {
    let mut publishers =
        Publishers::start(&["kept".into(), streams.to_string(), KEPT_BATCHES.to_string(), RECORDED.into()]);
    let mut specs = Vec::new();
    for _ in 0..streams {
        let line = publishers.line();
        let (events, replay) = line.split_once(' ').expect("two ports");
        specs.push(engine(events.parse().unwrap(), Some(replay.parse().unwrap()), 32).await);
    }
    let stop = CancellationToken::new();
    let (began, before) = (Instant::now(), cpu_s());
    let fleet = start(&FleetConfig::new(specs), &stop);
    until("all are live", || {
        let view = fleet.snapshot();
        let live =
            view.instances.iter().flat_map(|i| &i.ranks).filter(|rank| rank.trust == Trust::Live).count();
        live == streams
    })
    .await;
    fleet.flush().await;
    let (wall_s, cpu_s) = (began.elapsed().as_secs_f64(), cpu_s() - before);
    publishers.go();
    let publisher_s = publishers.line().parse().unwrap();
    let mut blocks = 0;
    for (_, stats) in fleet.stats() {
        assert!(stats.batches >= KEPT_BATCHES && stats.gaps == 0 && stats.restarts == 0, "{stats:?}");
        let applied = stats.applied;
        blocks += applied.stored + applied.copies + applied.duplicates + applied.removed;
    }
    publishers.end();
    stop.cancel();
    fleet.stopped().await;
    Started { wall_s, cpu_s, publisher_s, blocks }
}
