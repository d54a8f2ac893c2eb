//! Probing, health, and the way of events into the index, over real sockets.

mod captures;
mod doctor;
mod rebuild;
mod support;
mod trtllm;

use axum::http::StatusCode;
use kvlane_index::{BlockSize, Overlaps, Worker};
use kvlane_server::config::Endpoint;
use kvlane_server::fleet::{CachedTokens, EngineKind, FleetView, Health, Source};
use serde_json::json;
use support::{Event, Http, Rank, Running, Says, hashes, publishing_vllm, stored, trusts, vllm};

const W0: Worker = Worker::new(0, 0);
const W1: Worker = Worker::new(1, 0);

fn tokens(n: u32) -> Vec<u32> {
    (100..100 + n).collect()
}

#[tokio::test]
async fn a_base_url_alone_tells_everything_about_a_vllm() {
    let mut ranks = [Rank::start("kv@1", 0, 0).await, Rank::start("kv@1", 0, 0).await];
    for rank in &mut ranks {
        rank.publish(&[]).await;
    }
    let sources = json!({"1": ranks[1].source(), "0": ranks[0].source()});
    let http = Http::start(Says { sources: Some(sources), ..vllm("m", 16, 1.5e9) }, 0).await;
    let running = Running::start(&[http.url()]);
    let view = running.until("both ranks are live", |v| {
        let ranks = &v.instances[0].ranks;
        ranks.len() == 2 && ranks.iter().all(|r| r.trust.name() == "live")
    });
    let view = view.await;
    let instance = &view.instances[0];
    let facts = instance.facts.as_ref().unwrap();
    assert_eq!((facts.engine, facts.version.as_deref()), (EngineKind::Vllm, Some("0.32.0")));
    assert_eq!(facts.models.len(), 2);
    assert_eq!(instance.model("m-lora").unwrap().parent.as_deref(), Some("m"));
    assert_eq!(instance.model("m-lora").unwrap().max_model_len, Some(4096));
    assert_eq!((facts.block_size.tokens(), facts.block_size_source), (16, Source::Engine));
    assert_eq!((facts.ranks, facts.capacity_blocks), (2, Some(128)));
    assert_eq!(facts.started_at_ms, Some(1_500_000_000_000));
    for (publisher, rank) in facts.publishers.iter().zip(&ranks) {
        assert_eq!(publisher.events, Endpoint::new("127.0.0.1", rank.events_port));
        assert_eq!(publisher.replay, Some(Endpoint::new("127.0.0.1", rank.replay_port)));
        assert_eq!(publisher.topic.as_deref(), Some("kv@1"));
    }
    assert_eq!(facts.notes, Vec::<String>::new());
    assert_eq!(view.serving("m-lora").len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn an_sglang_says_it_in_its_server_info() {
    let mut rank = Rank::start("kv-events", 0, 0).await;
    rank.publish(&[Event::Cleared]).await;
    let info = json!({
        "version": "0.5.23", "page_size": 64, "dp_size": 1, "enable_cache_report": true, "max_total_num_tokens": 6400,
        "kv_events": {
            "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": rank.events_port, "topic": "kv-events",
            "block_size": 32, "dp_size": 1, "replay_endpoint_port_base": rank.replay_port,
        },
    });
    let says = Says {
        models: json!({"object": "list", "data": [{"id": "s", "owned_by": "sglang", "max_model_len": 100}]}),
        server_info: Some(info),
        sources: None,
        ..vllm("s", 1, 1e9)
    };
    let http = Http::start(Says { metrics: String::new(), ..says }, 0).await;
    let running = Running::start(&[http.url()]);
    let view = running.until("it is live", |v| trusts(&v.instances[0], "live")).await;
    let facts = view.instances[0].facts.as_ref().unwrap();
    assert_eq!((facts.engine, facts.version.as_deref()), (EngineKind::Sglang, Some("0.5.23")));
    assert_eq!((facts.block_size.tokens(), facts.capacity_blocks), (32, Some(200)));
    assert_eq!(facts.cached_tokens, CachedTokens::Reported);
    assert_eq!(facts.publishers[0].events.port, rank.events_port);
    running.stop().await;
}

#[tokio::test]
async fn what_is_no_engine_is_told_so_and_used_once_it_is_one() {
    let page = Says { models: json!("hello"), ..vllm("m", 16, 1e9) };
    let http = Http::start(page, 0).await;
    let port = http.address.port();
    let rank = Rank::start("kv", 0, 0).await;
    let event_port = format!("http://127.0.0.1:{}", rank.events_port);
    let running = Running::start(&[http.url(), event_port, "http://127.0.0.1:1".to_owned()]);
    let view = running
        .until("all three have a reason", |v| v.instances.iter().all(|i| i.health.reason().is_some()))
        .await;
    let reason = |i: usize| view.instances[i].health.reason().unwrap().to_owned();
    assert!(reason(0).contains("is not an engine: its /v1/models is not OpenAI's list"), "{}", reason(0));
    assert!(reason(1).contains("not its event port"), "{}", reason(1));
    assert!(reason(2).contains("cannot connect"), "{}", reason(2));
    assert!(view.instances.iter().all(|i| i.health.name() == "probing"));
    assert_eq!(view.serving("m").len(), 0);

    http.stop().await;
    let http = Http::start(vllm("m", 16, 1e9), port).await;
    running.until("the first is an engine", |v| v.serving("m").len() == 1).await;
    running.stop().await;
    http.stop().await;
}

#[tokio::test]
async fn events_before_and_after_the_subscription_reach_the_index() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let prompt = tokens(16);
    rank.publish(&[stored(1, &prompt[..8], 4)]).await;
    let running = Running::start(&[http.url()]);
    running.until_overlap(W0, &prompt, 2).await;
    running.until("it is live", |v| trusts(&v.instances[0], "live")).await;
    let next = Event::Stored {
        hashes: vec![3, 4],
        parent: Some(2),
        tokens: prompt[8..].to_vec(),
        block_size: 4,
        lora: None,
    };
    rank.publish(&[next]).await;
    running.until_overlap(W0, &prompt, 4).await;
    rank.publish(&[Event::Removed(vec![4])]).await;
    running.until_overlap(W0, &prompt, 3).await;
    rank.publish(&[Event::Cleared]).await;
    running.until_overlap(W0, &prompt, 0).await;

    let (worker, stats) = &running.fleet.stats()[0];
    assert_eq!((*worker, stats.stored_events, stats.removed_events, stats.cleared_events), (W0, 2, 1, 1));
    assert_eq!((stats.applied.stored, stats.applied.removed, stats.applied.cleared), (4, 1, 3));
    assert_eq!((stats.gaps, stats.restarts, stats.connects), (0, 0, 1));
    assert!(stats.lag_s.is_some());
    running.stop().await;
}

#[tokio::test]
async fn a_lost_batch_is_asked_for_again() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let prompt = tokens(12);
    let running = Running::start(&[http.url()]);
    rank.publish(&[stored(1, &prompt[..4], 4)]).await;
    running.until_overlap(W0, &prompt, 1).await;
    let next = |hash, parent, part: &[u32]| Event::Stored {
        hashes: vec![hash],
        parent: Some(parent),
        tokens: part.to_vec(),
        block_size: 4,
        lora: None,
    };
    rank.publish_and_lose(&[next(2, 1, &prompt[4..8])]);
    rank.publish(&[next(3, 2, &prompt[8..])]).await;
    running.until_overlap(W0, &prompt, 3).await;
    running.until("it is live again", |v| trusts(&v.instances[0], "live")).await;
    assert_eq!(running.fleet.stats()[0].1.gaps, 1);

    // What the engine itself has forgotten voids the rank, and only what is published from now on is claimed.
    rank.publish_and_lose(&[Event::Removed(vec![1])]);
    rank.publish(&[stored(11, &tokens(8), 4)]).await;
    rank.retain_last(1);
    rank.publish_and_lose(&[Event::Removed(vec![2])]);
    rank.publish_and_lose(&[Event::Removed(vec![3])]);
    rank.retain_last(0);
    rank.publish(&[stored(21, &tokens(4), 4)]).await;
    running.until("it rebuilds", |v| trusts(&v.instances[0], "rebuilding")).await;
    running.until_overlap(W0, &prompt, 1).await;
    running.stop().await;
}

#[tokio::test]
async fn an_engine_core_that_restarts_behind_its_ports_is_noticed() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let (events_port, replay_port) = (rank.events_port, rank.replay_port);
    let prompt = tokens(8);
    let running = Running::start(&[http.url()]);
    rank.publish(&[stored(1, &prompt, 4)]).await;
    running.until_overlap(W0, &prompt, 2).await;
    rank.stop().await;
    let mut rank = Rank::start("kv", events_port, replay_port).await;
    rank.publish(&[stored(7, &prompt[..4], 4)]).await;
    running.until_overlap(W0, &prompt, 1).await;
    running.until("it is live", |v| trusts(&v.instances[0], "live")).await;
    let stats = &running.fleet.stats()[0].1;
    assert!(stats.connects >= 2 && stats.epoch >= 1, "{stats:#?}");
    running.stop().await;
}

#[tokio::test]
async fn a_dead_engine_is_cleared_and_used_again_when_it_is_back_as_another_one() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let (other, mut other_rank) = publishing_vllm("m", 4).await;
    let port = http.address.port();
    let prompt = tokens(8);
    let running = Running::start(&[http.url(), other.url()]);
    rank.publish(&[stored(1, &prompt, 4)]).await;
    other_rank.publish(&[stored(1, &prompt, 4)]).await;
    running.until_overlap(W0, &prompt, 2).await;
    running.until_overlap(W1, &prompt, 2).await;
    http.stop().await;
    rank.stop().await;
    running.fleet.report_failure(W0.instance);
    let view = running.until("it is dead", |v| matches!(v.instances[0].health, Health::Dead(_))).await;
    assert!(view.instances[0].health.reason().unwrap().contains("cannot connect"));
    assert_eq!(view.serving("m").len(), 1);
    assert!(view.knows("m"));
    running.until_overlap(W0, &prompt, 0).await;
    running.until_overlap(W1, &prompt, 2).await;

    let mut rank = Rank::start("kv", 0, 0).await;
    rank.publish(&[stored(9, &tokens(32), 8)]).await;
    let says = Says { sources: Some(json!({"0": rank.source()})), ..vllm("n", 8, 2e9) };
    let http = Http::start(says, port).await;
    running.until("it serves its new model", |v| v.serving("n").len() == 1).await;
    running.until_overlap(W0, &tokens(32), 4).await;
    let view = running.fleet.snapshot();
    assert_eq!(view.instances[0].partition.as_ref().unwrap().model, "n");
    assert_eq!(view.serving("m").len(), 1);
    running.stop().await;
    http.stop().await;
}

#[tokio::test]
async fn a_busy_engine_that_answers_requests_is_not_dead() {
    let (http, _rank) = publishing_vllm("m", 4).await;
    let running = Running::start(&[http.url()]);
    running.until("it is healthy", |v| v.serving("m").len() == 1).await;
    for _ in 0..20 {
        running.fleet.report_failure(W0.instance);
        tokio::task::yield_now().await;
    }
    running.fleet.flush().await;
    assert_eq!(running.fleet.snapshot().serving("m").len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn an_engine_that_says_503_is_dead() {
    let (http, rank) = publishing_vllm("m", 4).await;
    let port = http.address.port();
    let running = Running::start(&[http.url()]);
    running.until("it is healthy", |v| v.serving("m").len() == 1).await;
    http.stop().await;
    let sick = Says { health: StatusCode::SERVICE_UNAVAILABLE, ..vllm("m", 4, 1e9) };
    let http = Http::start(Says { sources: Some(json!({"0": rank.source()})), ..sick }, port).await;
    running.until("it is dead", |v| v.instances[0].health.reason().is_some_and(|r| r.contains("503"))).await;
    // Its list of models does not make it healthy again.
    let asked_again =
        |v: &FleetView| v.instances[0].health.reason().is_some_and(|r| r.contains("does not serve now"));
    running.until("it was asked again", asked_again).await;
    assert!(running.fleet.snapshot().serving("m").is_empty());
    running.stop().await;
    http.stop().await;
}

#[tokio::test]
async fn a_worker_without_events_is_blind_and_served_by_predictions() {
    let http = Http::start(vllm("m", 4, 1e9), 0).await;
    let running = Running::start(&[http.url()]);
    let view = running.until("it is healthy", |v| v.serving("m").len() == 1).await;
    let instance = &view.instances[0];
    let trust = instance.ranks[0].trust.to_string();
    assert!(trust.starts_with("blind") && trust.contains("--kv-events-config"), "{trust}");
    let partition = instance.partition.as_ref().unwrap();
    let prompt = hashes(&tokens(8), BlockSize::new(4).unwrap());
    partition.index.predict(W0, &prompt, kvlane_server::clock::now_ms() + 60_000);
    let mut overlaps = Overlaps::default();
    partition.index.overlap(&prompt, &mut overlaps);
    assert_eq!(overlaps.get(W0).map(|o| (o.device, o.predicted)), Some((0, 2)));
    http.stop().await;
    running.until("it is dead", |v| v.instances[0].health.name() == "dead").await;
    partition.flush().await;
    partition.index.overlap(&prompt, &mut overlaps);
    assert_eq!(overlaps.get(W0), None);
    running.stop().await;
}

#[tokio::test]
async fn expired_predictions_go_away_by_themselves() {
    let http = Http::start(vllm("m", 4, 1e9), 0).await;
    let running = Running::start(&[http.url()]);
    let view = running.until("it is healthy", |v| v.serving("m").len() == 1).await;
    let partition = view.instances[0].partition.as_ref().unwrap();
    let prompt = hashes(&tokens(8), BlockSize::new(4).unwrap());
    partition.index.predict(W0, &prompt, kvlane_server::clock::now_ms() + 1);
    while partition.index.stats().predicted > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    running.stop().await;
}

#[tokio::test]
async fn block_sizes_have_their_own_partitions_and_adapters_share_their_bases() {
    let (small, mut small_rank) = publishing_vllm("m", 4).await;
    let (large, mut large_rank) = publishing_vllm("m", 8).await;
    let running = Running::start(&[small.url(), large.url()]);
    small_rank.publish(&[stored(1, &tokens(16), 4)]).await;
    large_rank.publish(&[stored(1, &tokens(16), 8)]).await;
    running.until_overlap(W0, &tokens(16), 4).await;
    running.until_overlap(W1, &tokens(16), 2).await;
    let view = running.fleet.snapshot();
    let sizes: Vec<u32> =
        view.instances.iter().map(|i| i.partition.as_ref().unwrap().block_size.tokens()).collect();
    assert_eq!(sizes, [4, 8]);
    assert_eq!(view.serving("m-lora").len(), 2);
    running.stop().await;
}

#[tokio::test]
async fn garbage_on_one_publisher_leaves_the_others_alone() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let (other, mut other_rank) = publishing_vllm("m", 4).await;
    let running = Running::start(&[http.url(), other.url()]);
    running.until("both are asked", |v| v.instances.iter().all(|i| trusts(i, "live"))).await;
    for seq in 0..50u64 {
        rank.send(vec![b"kv".to_vec(), seq.to_be_bytes().to_vec(), vec![0xc1; 7]]).await;
        rank.send(vec![b"kv".to_vec(), vec![1, 2, 3], vec![0x93]]).await;
        rank.send(vec![b"kv-of-another".to_vec(), seq.to_be_bytes().to_vec(), vec![0x93]]).await;
        rank.send(vec![b"kv".to_vec()]).await;
    }
    other_rank.publish(&[stored(1, &tokens(8), 4)]).await;
    running.until_overlap(W1, &tokens(8), 2).await;
    running.until("the first is degraded", |v| trusts(&v.instances[0], "degraded")).await;
    let dropped: u64 = running.fleet.stats()[0].1.drops().map(|(_, n)| n).sum();
    assert!(dropped >= 150, "{dropped}");
    running.stop().await;
}

#[tokio::test]
async fn without_a_wish_for_cache_knowledge_nothing_is_subscribed() {
    let (http, _rank) = publishing_vllm("m", 4).await;
    let mut config = kvlane_server::fleet::FleetConfig::new(vec![http.url().parse().unwrap()]);
    config.cache_aware = false;
    let stop = tokio_util::sync::CancellationToken::new();
    let fleet = kvlane_server::fleet::start(&config, &stop);
    let mut changed = fleet.changed();
    while fleet.snapshot().serving("m").is_empty() {
        changed.changed().await.unwrap();
    }
    let view = fleet.snapshot();
    assert!(view.instances[0].partition.is_none());
    assert_eq!(view.instances[0].ranks[0].trust.to_string(), "blind (its events are not wanted)");
    assert!(fleet.stats().is_empty());
    stop.cancel();
    fleet.stopped().await;
}
