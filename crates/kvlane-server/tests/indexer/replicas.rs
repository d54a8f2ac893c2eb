//! What outlives a process: kept on disk, and got from a peer; used only where the stream goes on.

use super::client::{get, post};
use super::support::{Event, Rank, stored};
use super::{Running, on_device, tokens};
use kvlane_server::indexer::IndexerError;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// A directory that is gone at the end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvlane-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    pub fn path(&self) -> PathBuf {
        self.0.clone()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn with_state(scratch: &Scratch) -> Running {
    Running::with(|config| config.state_dir = Some(scratch.0.clone())).await
}

async fn with_peer(peer: &Running) -> Running {
    let url = format!("http://{}", peer.at);
    Running::with(|config| config.peers = vec![url]).await
}

/// The `n`-th prompt, of two blocks that no other has.
pub fn prompt(n: u32) -> Vec<u32> {
    (n * 100..n * 100 + 8).collect()
}

pub fn nth(n: u32) -> Event {
    stored(u64::from(n) * 10, &prompt(n), 4)
}

async fn trust(indexer: &Running) -> Value {
    let ask = json!({"model_name": "m", "token_ids": []});
    post(indexer.at, "/v1/overlap", &ask).await.json()["ranks"][0]["trust"].clone()
}

/// Every block that an indexer's dump names, with its parent.
async fn held(indexer: &Running) -> BTreeSet<(Option<u64>, u64, u64)> {
    let dump = get(indexer.at, "/dump").await.json();
    let mut held = BTreeSet::new();
    for event in dump["m:default"]["events"].as_array().unwrap() {
        let stored = &event["event"]["data"]["stored"];
        let mut parent = stored["parent_hash"].as_u64();
        for block in stored["blocks"].as_array().unwrap() {
            let name = block["block_hash"].as_u64().unwrap();
            held.insert((parent, name, block["tokens_hash"].as_u64().unwrap()));
            parent = Some(name);
        }
    }
    held
}

#[tokio::test]
async fn a_restarted_indexer_knows_what_the_engine_has_forgotten() {
    let scratch = Scratch::new("restart");
    let mut rank = Rank::start("kv", 0, 0).await;
    for n in 0..6 {
        rank.publish(&[nth(n)]).await;
    }
    let indexer = with_state(&scratch).await;
    indexer.register(7, &rank, 4).await;
    indexer.until_query(&prompt(5), on_device(&[(7, 8)])).await;
    indexer.stop().await;
    // Meanwhile it goes on, and forgets what it told; one batch before the stop is still there.
    rank.publish(&[Event::Removed(vec![11])]).await;
    rank.publish(&[nth(6)]).await;
    rank.retain_last(3);

    let indexer = with_state(&scratch).await;
    indexer.until_query(&prompt(0), on_device(&[(7, 8)])).await;
    indexer.until_query(&prompt(6), on_device(&[(7, 8)])).await;
    indexer.until_query(&prompt(1), on_device(&[(7, 4)])).await;
    assert_eq!(trust(&indexer).await, "live");
    rank.publish(&[nth(7)]).await;
    indexer.until_query(&prompt(7), on_device(&[(7, 8)])).await;
    indexer.stop().await;
}

#[tokio::test]
async fn state_that_the_stream_does_not_continue_is_not_used() {
    let scratch = Scratch::new("hole");
    let mut rank = Rank::start("kv", 0, 0).await;
    rank.publish(&[nth(0)]).await;
    let indexer = with_state(&scratch).await;
    indexer.register(7, &rank, 4).await;
    indexer.until_query(&prompt(0), on_device(&[(7, 8)])).await;
    indexer.stop().await;
    // A batch is missing between what was saved and what can be replayed: it may have removed anything.
    rank.publish(&[Event::Removed(vec![0, 1])]).await;
    rank.publish(&[nth(1)]).await;
    rank.retain_last(1);
    let indexer = with_state(&scratch).await;
    indexer.until_query(&prompt(1), on_device(&[(7, 8)])).await;
    // While the image is looked for and refused it is replaying.
    for _ in 0..2000 {
        if trust(&indexer).await != "replaying" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(trust(&indexer).await, "rebuilding");
    indexer.until_query(&prompt(0), on_device(&[])).await;
    indexer.stop().await;

    // Another life of the engine under the same numbers.
    let (events, replay) = (rank.events_port, rank.replay_port);
    rank.stop().await;
    let mut rank = Rank::start("kv", events, replay).await;
    for n in 10..14 {
        rank.publish(&[nth(n)]).await;
    }
    rank.retain_last(2);
    let indexer = with_state(&scratch).await;
    indexer.until_query(&prompt(13), on_device(&[(7, 8)])).await;
    indexer.until_query(&prompt(1), on_device(&[])).await;
    indexer.stop().await;
}

#[tokio::test]
async fn an_engine_that_is_away_keeps_its_saved_state_and_its_registration() {
    let scratch = Scratch::new("away");
    let mut rank = Rank::start("kv", 0, 0).await;
    rank.publish(&[nth(0)]).await;
    rank.publish(&[nth(1)]).await;
    let indexer = with_state(&scratch).await;
    indexer.register(7, &rank, 4).await;
    indexer.until_query(&prompt(1), on_device(&[(7, 8)])).await;
    indexer.stop().await;
    rank.retain_last(1);
    let (events, replay) = (rank.events_port, rank.replay_port);
    let last = rank.stop().await;
    // Twice started and stopped without its engine.
    for _ in 0..2 {
        let indexer = with_state(&scratch).await;
        assert_eq!(get(indexer.at, "/workers").await.json()[0]["instance_id"], 7);
        indexer.until_query(&prompt(1), on_device(&[])).await;
        indexer.stop().await;
    }
    // The same life of the engine, reachable again.
    let mut rank = Rank::start("kv", events, replay).await;
    for (seq, payload) in last {
        rank.record(seq, payload);
    }
    let indexer = with_state(&scratch).await;
    indexer.until_query(&prompt(0), on_device(&[(7, 8)])).await;
    indexer.stop().await;
}

#[tokio::test]
async fn a_new_replica_goes_on_where_its_peer_is() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let old = Running::start().await;
    old.register(7, &rank, 4).await;
    for n in 0..6 {
        rank.publish(&[nth(n)]).await;
    }
    rank.publish(&[Event::Removed(vec![11])]).await;
    old.until_query(&prompt(1), on_device(&[(7, 4)])).await;
    rank.retain_last(1);
    // Without a registration of its own.
    let new = with_peer(&old).await;
    new.until_query(&prompt(0), on_device(&[(7, 8)])).await;
    new.until_query(&prompt(1), on_device(&[(7, 4)])).await;
    assert_eq!(trust(&new).await, "live");
    rank.publish(&[nth(6)]).await;
    for indexer in [&old, &new] {
        indexer.until_query(&prompt(6), on_device(&[(7, 8)])).await;
    }
    assert_eq!(held(&old).await, held(&new).await);
    old.stop().await;
    new.stop().await;
}

#[tokio::test]
async fn where_there_is_no_replay_a_batch_that_both_heard_is_the_proof() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let old = Running::start().await;
    let mut registration = super::registration(7, &rank, 4);
    registration["replay_endpoint"] = Value::Null;
    assert_eq!(post(old.at, "/register", &registration).await.status, 201);
    // A subscription takes a moment, and nothing says when it is there.
    for n in 0..200 {
        rank.publish(&[nth(n)]).await;
        let ask = json!({"token_ids": prompt(n), "model_name": "m"});
        tokio::time::sleep(Duration::from_millis(20)).await;
        if post(old.at, "/query", &ask).await.json() == on_device(&[(7, 8)]) {
            break;
        }
    }
    rank.publish(&[nth(300)]).await;
    old.until_query(&prompt(300), on_device(&[(7, 8)])).await;
    let new = with_peer(&old).await;
    let mut n = 301;
    let learnt = async {
        loop {
            rank.publish(&[nth(n)]).await;
            n += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let ask = json!({"token_ids": prompt(300), "model_name": "m"});
            let answer = post(new.at, "/query", &ask).await;
            if answer.status == 200 && answer.json() == on_device(&[(7, 8)]) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), learnt).await.expect("what the peer knew is known");
    old.stop().await;
    new.stop().await;
}

#[tokio::test]
async fn a_peer_that_does_not_help_costs_nothing_but_time() {
    let mut rank = Rank::start("kv", 0, 0).await;
    rank.publish(&[nth(0)]).await;
    rank.publish(&[nth(1)]).await;
    rank.retain_last(1);
    let alone = Running::with(|config| config.peers = vec!["http://127.0.0.1:1".to_owned()]).await;
    alone.register(7, &rank, 4).await;
    alone.until_query(&prompt(1), on_device(&[(7, 8)])).await;
    // Its own name is among the peers, as where one name stands for all replicas.
    let own = json!({"url": format!("http://{}", alone.at)});
    assert_eq!(post(alone.at, "/register_peer", &own).await.status, 201);
    rank.publish(&[nth(2)]).await;
    alone.until_query(&prompt(2), on_device(&[(7, 8)])).await;
    alone.stop().await;
}

#[tokio::test]
async fn what_cannot_be_an_image_is_refused_by_name() {
    let rank = Rank::start("kv", 0, 0).await;
    let indexer = Running::start().await;
    indexer.register(7, &rank, 4).await;
    let endpoint = format!("tcp%3A%2F%2F127.0.0.1%3A{}", rank.events_port);
    for (query, status) in [
        ("", 400),
        ("?endpoint=x&model_name=m&block_size=x&scheme=reference", 400),
        ("?endpoint=x&model_name=m&block_size=4&scheme=md5", 400),
        ("?endpoint=x&model_name=m&block_size=4&scheme=reference", 404),
        ("?endpoint=x&model_name=n&block_size=4&scheme=reference", 404),
        ("?endpoint=x&model_name=m&block_size=8&scheme=reference", 409),
        ("?endpoint=x&model_name=m&block_size=4&scheme=kvlane", 409),
        // Nothing was published yet, so there is no place in the stream.
        (&format!("?endpoint={endpoint}&model_name=m&block_size=4&scheme=reference"), 503),
    ] {
        let answer = get(indexer.at, &format!("/kvlane/snapshot{query}")).await;
        assert_eq!(answer.status, status, "{query}: {answer:?}");
        assert!(!answer.error().is_empty());
    }
    assert_eq!(get(indexer.at, "/v1/registrations").await.json()[0]["instance_id"], 7);
    indexer.stop().await;
}

#[tokio::test]
async fn a_state_directory_belongs_to_one_process_and_bad_state_is_left_out() {
    let scratch = Scratch::new("one");
    let first = with_state(&scratch).await;
    let mut config = kvlane_server::indexer::IndexerConfig::new("127.0.0.1:0".parse().unwrap());
    config.state_dir = Some(scratch.0.clone());
    let second = kvlane_server::indexer::start(config, tokio_util::sync::CancellationToken::new()).await;
    let error = second.unwrap_err();
    assert!(matches!(error, IndexerError::State(_)), "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    first.stop().await;
    std::fs::write(scratch.0.join("state.kvlane"), b"KVLIMG\x00\x01garbage").unwrap();
    let again = with_state(&scratch).await;
    assert_eq!(get(again.at, "/workers").await.json(), json!([]));
    let prompt = tokens(4);
    assert_eq!(post(again.at, "/query", &json!({"token_ids": prompt, "model_name": "m"})).await.status, 404);
    again.stop().await;
}
