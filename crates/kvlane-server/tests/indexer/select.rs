//! Selection as a service: choose, book, report, free; and what a killed caller leaves.

use super::client::{call, get, post};
use super::support::{Rank, stored};
use super::{Running, on_device, registration, tokens};
use kvlane_server::indexer::Knowledge;
use serde_json::{Value, json};
use std::time::Duration;

async fn two_workers(prompt: &[u32]) -> (Running, Rank, Rank) {
    let (mut a, b) = (Rank::start("kv", 0, 0).await, Rank::start("kv", 0, 0).await);
    a.publish(&[stored(1, prompt, 4)]).await;
    let indexer = Running::start().await;
    indexer.register(1, &a, 4).await;
    indexer.register(2, &b, 4).await;
    let held = prompt.len() as u32 / 4 * 4;
    indexer.until_query(prompt, on_device(&[(1, held)])).await;
    (indexer, a, b)
}

async fn load(indexer: &Running, instance: u64, what: &str) -> u64 {
    let loads = get(indexer.at, "/v1/loads").await.json();
    let of = |w: &&Value| w["instance_id"] == json!(instance);
    loads["workers"].as_array().unwrap().iter().find(of).map_or(0, |w| w[what].as_u64().unwrap())
}

#[tokio::test]
async fn the_holder_of_a_prompt_is_chosen_and_the_reason_given() {
    let prompt = tokens(1000);
    let (indexer, _a, b) = two_workers(&prompt).await;
    let ask = json!({"model_name": "m", "token_ids": prompt});
    let answer = post(indexer.at, "/v1/select", &ask).await;
    let chosen = answer.json();
    assert_eq!(
        (answer.status, &chosen["instance_id"], &chosen["dp_rank"]),
        (200, &json!(1), &json!(0)),
        "{chosen}"
    );
    // An engine always computes the last token, so the last block does not count.
    assert_eq!((&chosen["cached_tokens"], &chosen["prompt_tokens"]), (&json!(996), &json!(1000)));
    assert_eq!(chosen["order"].as_array().unwrap().len(), 2);
    assert_eq!(chosen["candidates"].as_array().unwrap().len(), 2);
    assert!(
        chosen["candidates"][0]["total"].as_f64().unwrap()
            < chosen["candidates"][1]["total"].as_f64().unwrap()
    );
    assert_eq!(get(indexer.at, "/v1/loads").await.json()["reservations"], 0, "a choice books nothing");

    let mut pinned = ask.clone();
    pinned["pinned"] = json!({"instance_id": 2});
    let chosen = post(indexer.at, "/v1/select", &pinned).await.json();
    assert_eq!(chosen["instance_id"], 2);
    assert_eq!(chosen["endpoint"], format!("tcp://127.0.0.1:{}", b.events_port));
    let mut only = ask.clone();
    only["workers"] = json!([{"instance_id": 9, "dp_rank": 3}]);
    let chosen = post(indexer.at, "/v1/select", &only).await.json();
    assert_eq!(
        (&chosen["instance_id"], &chosen["dp_rank"], &chosen["endpoint"]),
        (&json!(9), &json!(3), &Value::Null)
    );

    for (change, status, hint) in [
        (json!({"pinned": {"instance_id": 5}}), 400, "pinned names a worker"),
        (json!({"workers": []}), 503, "no worker"),
        (json!({"model_name": "x"}), 404, "no indexer for model=x"),
        (json!({"lease_ms": 5}), 400, "/v1/reservations"),
        (json!({"token_ids": null}), 400, "either token_ids or block_hashes"),
        (
            json!({"token_ids": null, "block_hashes": [1, 2], "scheme": "reference", "prompt_tokens": 3}),
            400,
            "less than",
        ),
    ] {
        let mut body = ask.clone();
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let answer = post(indexer.at, "/v1/select", &body).await;
        assert_eq!(answer.status, status, "{change}: {answer:?}");
        assert!(answer.error().contains(hint), "{change}: {}", answer.error());
    }
    indexer.stop().await;
}

#[tokio::test]
async fn a_reservation_is_load_until_it_is_freed() {
    let prompt = tokens(1000);
    let (indexer, ..) = two_workers(&prompt).await;
    let other: Vec<u32> = (5000..6000).collect();
    let ask =
        json!({"model_name": "m", "token_ids": other, "reservation_id": "r/1", "pinned": {"instance_id": 2}});
    let first = post(indexer.at, "/v1/reservations", &ask).await;
    assert_eq!((first.status, &first.json()["reservation_id"]), (201, &json!("r/1")), "{first:?}");
    assert_eq!(first.json()["lease_ms"], 60_000);
    assert_eq!(load(&indexer, 2, "prefill_tokens").await, 1000);
    // The same question again is the answer that was lost, not a second booking.
    let again = post(indexer.at, "/v1/reservations", &ask).await;
    assert_eq!((again.status, &again.json()["instance_id"]), (200, &json!(2)));
    assert_eq!(load(&indexer, 2, "prefill_tokens").await, 1000);

    let at = "/v1/reservations/r%2F1";
    assert_eq!(post(indexer.at, &format!("{at}/prefill_complete"), &json!({})).await.status, 200);
    assert_eq!(
        (load(&indexer, 2, "prefill_tokens").await, load(&indexer, 2, "decode_tokens").await),
        (0, 1001)
    );
    assert_eq!(post(indexer.at, &format!("{at}/output"), &json!({"tokens": 9})).await.status, 200);
    assert_eq!(load(&indexer, 2, "decode_tokens").await, 1010);
    assert_eq!(post(indexer.at, &format!("{at}/renew"), &json!({})).await.status, 200);
    // Where it was booked its blocks are expected, for the next one to follow.
    let next = post(indexer.at, "/v1/select", &json!({"model_name": "m", "token_ids": other})).await.json();
    assert_eq!(next["instance_id"], 2, "{next}");
    assert_eq!(call(indexer.at, "DELETE", at, b"").await.status, 200);
    let freed = call(indexer.at, "DELETE", at, b"").await;
    assert_eq!((freed.status, freed.error().contains("no such reservation")), (404, true));
    assert_eq!(post(indexer.at, &format!("{at}/renew"), &json!({})).await.status, 404);
    let loads = get(indexer.at, "/v1/loads").await.json();
    assert_eq!(
        (&loads["reservations"], &loads["freed"], &loads["expired"]),
        (&json!(0), &json!(1), &json!(0))
    );
    assert_eq!(load(&indexer, 2, "decode_tokens").await, 0);
    indexer.stop().await;
}

#[tokio::test]
async fn requests_that_come_together_do_not_all_choose_the_idle_worker() {
    let prompt = tokens(1000);
    let (indexer, ..) = two_workers(&prompt).await;
    let mut asked = tokio::task::JoinSet::new();
    for i in 0..20u32 {
        let at = indexer.at;
        let own: Vec<u32> = (i * 10_000 + 20_000..i * 10_000 + 21_000).collect();
        asked.spawn(async move {
            let answer = post(at, "/v1/reservations", &json!({"model_name": "m", "token_ids": own})).await;
            assert_eq!(answer.status, 201);
            answer.json()["instance_id"].as_u64().unwrap()
        });
    }
    let chosen = asked.join_all().await;
    assert_eq!(chosen.iter().filter(|i| **i == 1).count(), 10, "{chosen:?}");
    indexer.stop().await;
}

#[tokio::test]
async fn what_a_killed_caller_leaves_ends_with_its_lease() {
    let prompt = tokens(1000);
    let (indexer, ..) = two_workers(&prompt).await;
    for lease_ms in [0, 3_600_001] {
        let ask = json!({"model_name": "m", "token_ids": [1], "lease_ms": lease_ms});
        assert_eq!(post(indexer.at, "/v1/reservations", &ask).await.status, 400);
    }
    let ask = json!({"model_name": "m", "token_ids": prompt, "lease_ms": 1});
    assert_eq!(post(indexer.at, "/v1/reservations", &ask).await.status, 201);
    let expired = async {
        loop {
            let loads = get(indexer.at, "/v1/loads").await.json();
            if loads["expired"] == json!(1) {
                return loads;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let loads = tokio::time::timeout(Duration::from_secs(20), expired).await.expect("it expires");
    assert_eq!(loads["reservations"], 0);
    assert_eq!(loads["workers"][0]["prefill_requests"], 0);
    indexer.stop().await;
}

#[tokio::test]
async fn where_decisions_are_all_that_is_known_they_choose() {
    let indexer = Running::with(|config| config.knowledge = Knowledge::Decisions).await;
    let prompt = tokens(1000);
    let decision =
        json!({"writer": "r", "model_name": "m", "instance_id": 4, "block_size": 4, "token_ids": prompt});
    assert_eq!(post(indexer.at, "/v1/decisions", &decision).await.status, 200);
    let workers = json!([{"instance_id": 3}, {"instance_id": 4}]);
    let ask = json!({"model_name": "m", "token_ids": prompt, "workers": workers});
    assert_eq!(post(indexer.at, "/v1/select", &ask).await.json()["instance_id"], 4);
    let rank = Rank::start("kv", 0, 0).await;
    assert_eq!(post(indexer.at, "/register", &registration(7, &rank, 4)).await.status, 409);
    indexer.stop().await;
}
