//! Routing decisions as knowledge: one writer, and never beside events.

use super::client::post;
use super::support::Rank;
use super::{Running, on_device, registration, tokens};
use kvlane_server::indexer::{IndexerConfig, Knowledge, Registration, start};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

async fn told() -> Running {
    Running::with(|config| config.knowledge = Knowledge::Decisions).await
}

fn decision(writer: &str, instance: u64, tokens: &[u32]) -> Value {
    json!({"writer": writer, "model_name": "m", "instance_id": instance, "block_size": 4, "token_ids": tokens})
}

#[tokio::test]
async fn a_decision_is_an_answer_until_it_expires() {
    let indexer = told().await;
    let prompt = tokens(10);
    let recorded = post(indexer.at, "/v1/decisions", &decision("r1", 7, &prompt)).await;
    assert_eq!(
        (recorded.status, recorded.json()),
        (200, json!({"status": "ok", "blocks": 2, "block_size": 4}))
    );
    indexer.until_query(&prompt, on_device(&[(7, 8)])).await;
    let answer =
        post(indexer.at, "/v1/overlap", &json!({"model_name": "m", "token_ids": prompt})).await.json();
    assert_eq!((&answer["knowledge"], &answer["ranks"][0]["trust"]), (&json!("decisions"), &json!("blind")));
    assert_eq!(answer["ranks"][0]["predicted"]["blocks"], 2);
    assert_eq!(answer["ranks"][0]["device"]["blocks"], 0);

    let mut short = decision("r2", 8, &prompt);
    (short["model_name"], short["ttl_ms"]) = (json!("n"), json!(1));
    assert_eq!(post(indexer.at, "/v1/decisions", &short).await.status, 200);
    // With its last decision the partition ends, and with it the writer's right.
    let ask = json!({"model_name": "n", "token_ids": prompt});
    let gone = async {
        while post(indexer.at, "/query", &ask).await.status != 404 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), gone).await.expect("it expires");
    short["writer"] = json!("r3");
    assert_eq!(post(indexer.at, "/v1/decisions", &short).await.status, 200);
    indexer.stop().await;
}

#[tokio::test]
async fn one_writer_records_for_a_partition() {
    let indexer = told().await;
    let prompt = tokens(4);
    assert_eq!(post(indexer.at, "/v1/decisions", &decision("r1", 7, &prompt)).await.status, 200);
    let refused = post(indexer.at, "/v1/decisions", &decision("r2", 7, &prompt)).await;
    assert_eq!(refused.status, 409);
    assert!(refused.error().contains("recorded by \"r1\": one writer only"), "{}", refused.error());
    let mut elsewhere = decision("r2", 7, &prompt);
    elsewhere["routing_group"] = json!("g");
    assert_eq!(post(indexer.at, "/v1/decisions", &elsewhere).await.status, 200);
    indexer.stop().await;
}

#[tokio::test]
async fn events_and_decisions_do_not_mix() {
    let rank = Rank::start("kv", 0, 0).await;
    let indexer = told().await;
    let refused = post(indexer.at, "/register", &registration(7, &rank, 4)).await;
    assert_eq!(refused.status, 409);
    assert!(refused.error().contains("hears no engines"), "{}", refused.error());
    assert_eq!(post(indexer.at, "/register_peer", &json!({"url": "http://127.0.0.1:1"})).await.status, 409);
    indexer.stop().await;

    let indexer = Running::start().await;
    let refused = post(indexer.at, "/v1/decisions", &decision("r1", 7, &tokens(4))).await;
    assert_eq!(refused.status, 409);
    assert!(refused.error().contains("hears engines"), "{}", refused.error());
    indexer.stop().await;

    let mut config = IndexerConfig::new("127.0.0.1:0".parse().unwrap());
    config.knowledge = Knowledge::Decisions;
    config.peers = vec!["http://127.0.0.1:1".to_owned()];
    let error = start(config, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("no replicas"), "{error}");

    let mut config = IndexerConfig::new("127.0.0.1:0".parse().unwrap());
    config.knowledge = Knowledge::Decisions;
    config.registrations.push(Registration {
        instance: 7,
        rank: 0,
        endpoint: "tcp://127.0.0.1:1".parse().unwrap(),
        replay: None,
        model: "m".to_owned(),
        group: "default".to_owned(),
        block_size: kvlane_index::BlockSize::new(4).unwrap(),
    });
    let error = start(config, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("follows no engines"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_recorded_is_refused_by_name() {
    let indexer = told().await;
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = decision("r1", 7, &tokens(4));
        change(&mut body);
        body
    };
    assert_eq!(post(indexer.at, "/v1/decisions", &with(&|_| {})).await.status, 200);
    for (body, status, hint) in [
        (with(&|b| b["writer"] = json!("")), 400, "writer is empty"),
        (with(&|b| b["ttl_ms"] = json!(0)), 400, "ttl_ms"),
        (with(&|b| b["block_size"] = json!(0)), 400, "block_size is 0"),
        (with(&|b| b["block_size"] = json!(8)), 409, "existing=4, requested=8"),
        (
            with(&|b| {
                b["block_size"] = Value::Null;
                b["model_name"] = json!("new");
            }),
            400,
            "block_size is missing",
        ),
        (with(&|b| b["token_ids"] = Value::Null), 400, "either token_ids or block_hashes"),
        (with(&|b| b["more"] = json!(1)), 422, "unknown field"),
    ] {
        let answer = post(indexer.at, "/v1/decisions", &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert!(answer.error().contains(hint), "{body}: {}", answer.error());
    }
    indexer.stop().await;
}
