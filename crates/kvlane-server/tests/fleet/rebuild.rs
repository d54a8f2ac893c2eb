//! What a fence made unknown comes back: over real sockets, from what is remembered and from a rank that hashes alike.

use super::support::{Event, Http, Rank, Running, Says, publishing_vllm, stored, trusts, vllm};
use super::{W0, W1, tokens};
use kvlane_index::Worker;
use serde_json::json;

/// One more block below `parent`.
fn below(parent: u64, hash: u64, part: &[u32]) -> Event {
    Event::Stored {
        hashes: vec![hash],
        parent: Some(parent),
        tokens: part.to_vec(),
        block_size: 4,
        lora: None,
    }
}

/// Loses a batch that the engine itself does not have any more, and shows the hole by the next.
async fn make_a_hole(rank: &mut Rank) {
    rank.publish_and_lose(&[Event::Removed(vec![900_000])]);
    rank.publish_and_lose(&[Event::Removed(vec![900_001])]);
    rank.retain_last(0);
    rank.publish(&[Event::Removed(vec![900_002])]).await;
}

#[tokio::test]
async fn what_a_rank_said_before_a_hole_places_its_orphans() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    let prompt = tokens(16);
    let running = Running::start(&[http.url()]);
    rank.publish(&[stored(1, &prompt[..12], 4)]).await;
    running.until_overlap(W0, &prompt, 3).await;
    make_a_hole(&mut rank).await;
    running.until("it rebuilds", |v| trusts(&v.instances[0], "rebuilding")).await;
    running.until_overlap(W0, &prompt, 0).await;
    rank.publish(&[below(3, 4, &prompt[12..])]).await;
    running.until_overlap(W0, &prompt, 4).await;
    assert_eq!(running.fleet.stats()[0].1.regained.memory, 3);
    // What was regained goes by its own name.
    rank.publish(&[Event::Removed(vec![2])]).await;
    running.until_overlap(W0, &prompt, 1).await;
    running.stop().await;
    http.stop().await;
}

#[tokio::test]
async fn a_rank_that_hashes_alike_places_the_orphans_of_one_that_was_joined_late() {
    let (first, mut one) = publishing_vllm("m", 4).await;
    let (second, mut other) = publishing_vllm("m", 4).await;
    let (prompt, long) = (tokens(16), tokens(2_040)[2_000..].to_vec());
    // The second has forgotten what it published first.
    other.publish_and_lose(&[stored(1, &prompt[..12], 4)]);
    other.publish_and_lose(&[stored(100, &long, 4)]);
    other.retain_last(1);
    one.publish(&[stored(1, &prompt[..12], 4), stored(100, &long, 4)]).await;
    let running = Running::start(&[first.url(), second.url()]);
    running.until_overlap(W1, &long, 10).await;
    running.until_overlap(W0, &prompt, 3).await;
    assert_eq!(running.overlap(W1, &prompt), Some(0));
    other.publish(&[below(3, 4, &prompt[12..])]).await;
    running.until_overlap(W1, &prompt, 4).await;
    assert_eq!(running.fleet.stats()[1].1.regained.alike, 3);
    running.stop().await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_fence_of_one_rank_leaves_the_others_of_its_engine_alone() {
    let mut ranks = [Rank::start("kv", 0, 0).await, Rank::start("kv", 0, 0).await];
    let sources = json!({"0": ranks[0].source(), "1": ranks[1].source()});
    let http = Http::start(Says { sources: Some(sources), ..vllm("m", 4, 1e9) }, 0).await;
    let running = Running::start(&[http.url()]);
    let (zero, one) = (Worker::new(0, 0), Worker::new(0, 1));
    let prompt = tokens(8);
    for rank in &mut ranks {
        rank.publish(&[stored(1, &prompt, 4)]).await;
    }
    running.until_overlap(zero, &prompt, 2).await;
    running.until_overlap(one, &prompt, 2).await;
    make_a_hole(&mut ranks[0]).await;
    running.until_overlap(zero, &prompt, 0).await;
    running.until("the first rebuilds", |v| trusts(&v.instances[0], "rebuilding")).await;
    assert_eq!(running.overlap(one, &prompt), Some(2));
    assert_eq!(running.fleet.snapshot().instances[0].ranks[1].trust.name(), "live");
    let epochs: Vec<u64> = running.fleet.stats().iter().map(|(_, stats)| stats.epoch).collect();
    assert_eq!(epochs, [1, 0]);
    running.stop().await;
    http.stop().await;
}
