//! One run of the work under one policy: fresh engines, a fresh router, every conversation, and what came of it.

use super::client::Client;
use super::work::Conversation;
use crate::mock_engine::{Config, EventsConfig, Faults, MockEngine};
use anyhow::Context;
use indicatif::ProgressBar;
use kvlane_engine::wire::Form;
use kvlane_engine::{EngineConfig, Timing};
use kvlane_sched::Policy;
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, serve};
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Engines of the fleet.
pub(super) const ENGINES: usize = 4;
/// Blocks of 16 tokens in each engine's cache.
pub(super) const BLOCKS: u32 = 5_000;
/// Speed of the engines beside the one that was measured. Slow enough that a busy machine's own time does not count.
const SPEED: f64 = 0.5;
/// Tokens of an answer.
const ANSWER_TOKENS: u32 = 12;
/// How long the router may take to know its workers.
const READY_WITHIN: Duration = Duration::from_secs(15);
/// Between two looks at what the engines do.
const SAMPLE_EVERY: Duration = Duration::from_millis(25);

/// What came of a run.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    /// Times to first token, sorted.
    pub(super) first_tokens: Vec<Duration>,
    /// Requests in the busiest engine over the mean, averaged over time.
    pub(super) imbalance: f64,
    /// Seconds that each engine spent computing.
    pub(super) busy: Vec<Duration>,
    /// From the first request to the last answer.
    pub(super) took: Duration,
}

/// Plays all conversations. The engines write their tokenizer into `model_directory`, where the router finds it.
pub(super) async fn play(
    policy: Box<dyn Policy>,
    conversations: &Arc<Vec<Conversation>>,
    model_directory: &Path,
    progress: &ProgressBar,
) -> anyhow::Result<Outcome> {
    let mut engines = Vec::new();
    for _ in 0..ENGINES {
        engines.push(MockEngine::start(engine(model_directory)).await?);
    }
    let workers =
        engines.iter().map(|engine| WorkerSpec::new(&engine.url())).collect::<Result<Vec<_>, _>>()?;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let shutdown = CancellationToken::new();
    let config = ServeConfig { policy, ..ServeConfig::new(listen, FleetConfig::new(workers)) };
    let router = serve(config, shutdown.clone()).await?;
    let client = Client::new(format!("http://{}", router.address()));
    ready(&client).await?;

    let outcome = Arc::new(Mutex::new(Outcome::default()));
    let started = Instant::now();
    let mut people = JoinSet::new();
    for person in 0..conversations.len() {
        let (client, conversations) = (client.clone(), Arc::clone(conversations));
        let (outcome, progress) = (Arc::clone(&outcome), progress.clone());
        people.spawn(async move { converse(&client, &conversations[person], &outcome, &progress).await });
    }
    let (mut sum, mut samples) = (0.0, 0u32);
    let mut sample = tokio::time::interval(SAMPLE_EVERY);
    loop {
        tokio::select! {
            ended = people.join_next() => match ended {
                Some(ended) => ended.context("a conversation was lost")??,
                None => break,
            },
            _ = sample.tick() => {
                let busy = engines.iter().map(|engine| {
                    let load = engine.snapshot().load;
                    f64::from(load.running + load.waiting)
                });
                let (total, most) = busy.fold((0.0, 0.0f64), |(total, most), busy| (total + busy, most.max(busy)));
                // Below one request for each engine nothing can be even.
                if total >= ENGINES as f64 {
                    sum += most * ENGINES as f64 / total;
                    samples += 1;
                }
            }
        }
    }
    let took = started.elapsed();
    shutdown.cancel();
    router.ended().await;

    let mut outcome = std::mem::take(&mut *outcome.lock().expect("no holder of this lock panics"));
    outcome.first_tokens.sort_unstable();
    outcome.imbalance = if samples > 0 { sum / f64::from(samples) } else { 1.0 };
    outcome.busy =
        engines.iter().map(|engine| Duration::from_micros(engine.snapshot().totals.busy_us)).collect();
    outcome.took = took;
    Ok(outcome)
}

/// An engine as measured, but with a small cache.
fn engine(model_directory: &Path) -> Config {
    Config {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        model: "demo".to_owned(),
        adapters: Vec::new(),
        model_directory: Some(model_directory.to_owned()),
        max_model_len: 32_768,
        ranks: 1,
        engine: EngineConfig {
            blocks: BLOCKS,
            timing: Timing::h200_llama_8b().faster(SPEED),
            ..EngineConfig::h200_llama_8b()
        },
        events: Some(EventsConfig {
            port: 0,
            replay_port: 0,
            topic: String::new(),
            buffer_steps: 10_000,
            form: Form::VllmMap,
            announced: true,
        }),
        report_cached_tokens: true,
        keep_alive_s: 5,
        version: "0.32.0".to_owned(),
        faults: Faults::default(),
    }
}

async fn ready(client: &Client) -> anyhow::Result<()> {
    let until = Instant::now() + READY_WITHIN;
    while !client.status("/ready").await.is_ok_and(|status| status.is_success()) {
        anyhow::ensure!(Instant::now() < until, "the router is not ready after {READY_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn converse(
    client: &Client,
    conversation: &Conversation,
    outcome: &Mutex<Outcome>,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let mut messages = vec![json!({"role": "system", "content": conversation.instructions})];
    tokio::time::sleep(Duration::from_millis(conversation.comes_after_ms)).await;
    for (question, pause_ms) in conversation.questions.iter().zip(&conversation.pauses_ms) {
        messages.push(json!({"role": "user", "content": question}));
        let answer = client
            .chat(&json!({
                "model": "demo", "messages": messages, "max_tokens": ANSWER_TOKENS, "stream": true,
                "stream_options": {"include_usage": true},
            }))
            .await?;
        messages.push(json!({"role": "assistant", "content": answer.text}));
        {
            let mut outcome = outcome.lock().expect("no holder of this lock panics");
            outcome.prompt_tokens += answer.prompt_tokens;
            outcome.cached_tokens += answer.cached_tokens.unwrap_or(0);
            outcome.first_tokens.push(answer.first_token);
        }
        progress.inc(1);
        tokio::time::sleep(Duration::from_millis(*pause_ms)).await;
    }
    Ok(())
}
