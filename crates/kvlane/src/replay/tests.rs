//! A trace through a real router to mock engines, recorded on the way: what comes out is what went in.

use super::client::Client;
use super::drive::{Drive, Row, drive};
use super::prompts::{Form, Maker};
use super::report::Report;
use crate::mock_engine::MockEngine;
use crate::mock_engine::tests::config;
use crate::record;
use http_body_util::BodyExt;
use indicatif::ProgressBar;
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, serve};
use kvlane_sim::trace::{Nature, ReadOptions, Shape, Trace, generate, read};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

fn plan(url: &str, trace: Trace) -> Arc<Drive> {
    let maker = Maker {
        form: Form::Completions,
        model: "mock".into(),
        vocabulary: 30_000,
        seed: 1,
        max_output: 8,
        ignore_eos: true,
    };
    Arc::new(Drive {
        client: Client::new(url).expect("a URL"),
        trace,
        maker,
        most: 64,
        timeout: Duration::from_secs(60),
        progress: ProgressBar::hidden(),
    })
}

/// Whole blocks that each request shares with the ones before it, by the ids of its own trace.
fn shared(trace: &Trace) -> Vec<usize> {
    let mut seen = std::collections::HashSet::new();
    let mut shared = Vec::new();
    for request in &trace.requests {
        shared.push(trace.blocks(request).iter().take_while(|id| seen.contains(*id)).count());
        seen.extend(trace.blocks(request).iter().copied());
    }
    shared
}

/// Waits until the router has found all its workers out; `/ready` alone is content with one.
pub(crate) async fn ready(url: &str) -> Client {
    let client = Client::new(url).expect("a URL");
    loop {
        let answer = client.send(hyper::Method::GET, "/ready", &[], None).await.expect("an answer");
        let is_ready = answer.status().is_success();
        let body = answer.into_body().collect().await.expect("a whole answer").to_bytes();
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        let workers = body["workers"].as_array().expect("a list of workers");
        if is_ready && workers.iter().all(|worker| worker["health"] == "healthy") {
            return client;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recording_of_a_replay_is_the_trace_again() {
    let engine =
        MockEngine::start(config(&["--block-size", "16", "--speed", "20"])).await.expect("it starts");
    let worker = WorkerSpec::new(&engine.url()).expect("a URL");
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let stop = CancellationToken::new();
    let config = ServeConfig::new(listen, FleetConfig::new(vec![worker]));
    let router = serve(config, stop.clone()).await.expect("it listens");
    let url = format!("http://{}", router.address());
    ready(&url).await;

    let traffic = generate(Nature::MultiTurn, 40, 200.0, 7);
    // One after another in time, so that the order of arrival is the trace's.
    let shape = Shape { max_input_tokens: Some(16_000), think_cap_ms: Some(5.0), ..Shape::default() };
    let trace = shape.apply(&traffic, 7);
    let count = trace.requests.len();
    let folder = std::env::temp_dir().join(format!("kvlane-record-{}-{:p}", std::process::id(), &engine));
    std::fs::create_dir_all(&folder).expect("a place for files");
    let file = folder.join("recorded.jsonl");
    let args = record::Args::of(&url, &file, count as u64);
    let recording = tokio::spawn(record::run(args));
    // The recorder is connected when the router streams to it.
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let rows: Arc<Mutex<Vec<Row>>> = Arc::default();
    drive(plan(&url, trace.clone()), Arc::clone(&rows)).await;
    let rows = std::mem::take(&mut *rows.lock().expect("nobody panicked"));
    let report = Report::new(count, &rows, Duration::from_secs(1), Duration::from_secs(2));
    let json = report.json();
    assert_eq!(
        (json["answered"].as_u64(), json["failed"].as_object().map(serde_json::Map::len)),
        (Some(count as u64), Some(0)),
        "{json}"
    );
    let sent: u64 = trace.requests.iter().map(|r| u64::from(r.input_tokens)).sum();
    assert_eq!(json["prompt_tokens"], sent, "as ids lengths are exact");
    assert_eq!(json["workers"].as_object().map(serde_json::Map::len), Some(1), "the router names its worker");
    assert!(report.hit_rate().is_some_and(|rate| rate > 0.2), "turns repeat their conversation: {json}");
    let text = report.text();
    assert!(text.contains("hit rate") && text.contains(&format!("{count} of {count}")), "{text}");

    recording.await.expect("no panic").expect("a recording");
    let bytes = std::fs::read(&file).expect("the file is there");
    assert!(!String::from_utf8_lossy(&bytes).contains("\"prompt\""));
    let recorded = read("recorded", &bytes[..], &ReadOptions::default()).expect("a trace");
    assert_eq!(recorded.block_tokens, 16);
    let mut lengths: Vec<_> = recorded.requests.iter().map(|r| (r.input_tokens, r.output_tokens)).collect();
    let mut wanted: Vec<_> =
        trace.requests.iter().map(|r| (r.input_tokens, r.output_tokens.min(8))).collect();
    lengths.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(lengths, wanted);
    // The engine's blocks are as long as the generator's, so the sharing must be the same in sum, whatever came first.
    if trace.block_tokens == recorded.block_tokens {
        assert_eq!(shared(&recorded).iter().sum::<usize>(), shared(&trace).iter().sum::<usize>());
    } else {
        assert!(shared(&recorded).iter().sum::<usize>() > 0);
    }
    std::fs::remove_dir_all(&folder).expect("it was made above");
    stop.cancel();
    router.ended().await;
}
