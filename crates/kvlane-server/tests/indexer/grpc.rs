//! The same answers over gRPC: single calls, streams, reflection, health; bad questions and a port shared with HTTP.

use super::support::{Event, Rank, stored};
use super::{Running, hashes, on_device, tokens};
use crate::client::{get, post};
use kvlane_index::hash::Scheme;
use kvlane_server::grpc::v1::index_client::IndexClient;
use kvlane_server::grpc::v1::{
    DescribeRequest, OverlapRequest, OverlapResponse, RegisterRequest, Rule, Trust,
};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const SCHEME: Scheme = Scheme::Reference;

async fn connect(indexer: &Running) -> Channel {
    Channel::from_shared(format!("http://{}", indexer.at)).unwrap().connect().await.unwrap()
}

fn question(tag: u64, tokens: &[u32]) -> OverlapRequest {
    OverlapRequest {
        tag,
        model: "m".to_owned(),
        routing_group: String::new(),
        scheme: SCHEME.id(),
        block_hashes: hashes(tokens, 4, None, SCHEME).iter().map(|h| h.cast_unsigned()).collect(),
    }
}

fn register(instance: u64, rank: &Rank, block_size: u32) -> RegisterRequest {
    RegisterRequest {
        model: "m".to_owned(),
        routing_group: String::new(),
        block_size,
        instance,
        rank: 0,
        endpoint: format!("tcp://127.0.0.1:{}", rank.events_port),
        replay_endpoint: format!("tcp://127.0.0.1:{}", rank.replay_port),
    }
}

fn device(answer: &OverlapResponse) -> Vec<(u64, u32)> {
    answer.ranks.iter().map(|rank| (rank.instance, rank.device)).collect()
}

#[tokio::test]
async fn a_scheduler_registers_describes_and_asks_one_by_one_or_in_a_stream() {
    let (mut a, mut b) = (Rank::start("kv", 0, 0).await, Rank::start("kv", 0, 0).await);
    let prompt = tokens(18);
    a.publish(&[stored(1, &prompt[..16], 4)]).await;
    b.publish(&[stored(1, &prompt[..8], 4), Event::Removed(vec![2])]).await;
    let indexer = Running::start().await;
    let mut client = IndexClient::new(connect(&indexer).await);

    let ask = DescribeRequest { model: "m".to_owned(), routing_group: String::new() };
    let nothing_yet = client.describe(ask.clone()).await.unwrap().into_inner();
    assert_eq!((nothing_yet.block_size, nothing_yet.scheme, nothing_yet.events), (0, SCHEME.id(), true));
    assert_eq!(client.overlap(question(0, &prompt)).await.unwrap_err().code(), Code::NotFound);

    client.register(register(7, &a, 4)).await.unwrap();
    client.register(register(9, &b, 4)).await.unwrap();
    let twice = client.register(register(9, &b, 4)).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists, "{twice:?}");
    let other = client.register(register(11, &b, 8)).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition, "{other:?}");
    assert!(other.message().contains("block_size mismatch"), "{other:?}");

    // Both sides of the one port agree.
    indexer.until_query(&prompt, on_device(&[(7, 16), (9, 4)])).await;
    let answer = client.overlap(question(5, &prompt)).await.unwrap().into_inner();
    assert_eq!((answer.tag, answer.block_size, answer.error.as_str()), (5, 4, ""));
    assert_eq!(device(&answer), [(7, 4), (9, 1)]);
    assert!(answer.ranks.iter().all(|rank| rank.trust() == Trust::Live), "{answer:?}");

    let described = client.describe(ask).await.unwrap().into_inner();
    assert_eq!(described.block_size, 4);
    assert_eq!(described.ranks.len(), 2);
    assert_eq!(described.ranks[0].endpoint, format!("tcp://127.0.0.1:{}", a.events_port));
    assert_eq!(described.ranks[0].groups[0].rule(), Rule::Full);

    // A question that cannot be answered does not end the stream.
    let bad = OverlapRequest { scheme: 99, ..question(2, &prompt) };
    let asked = [question(1, &prompt), bad, OverlapRequest { model: "x".to_owned(), ..question(3, &prompt) }];
    let asked = asked.into_iter().chain((4..200).map(move |tag| question(tag, &prompt[..8])));
    let mut answers = client.overlap_stream(futures_util::stream::iter(asked)).await.unwrap().into_inner();
    let mut got = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        got.push(answer);
    }
    assert_eq!(got.iter().map(|a| a.tag).collect::<Vec<_>>(), (1..200).collect::<Vec<_>>());
    assert_eq!(device(&got[0]), [(7, 4), (9, 1)]);
    assert!(got[1].error.contains("scheme 99"), "{:?}", got[1]);
    assert!(got[2].error.contains("no such partition"), "{:?}", got[2]);
    assert!(got[3..].iter().all(|a| a.error.is_empty() && device(a) == [(7, 2), (9, 1)]));

    let metrics = get(indexer.at, "/metrics").await.text;
    assert!(metrics.contains(r#"endpoint="/kvlane.index.v1.Index/{call}""#), "{metrics}");
    drop(client);
    indexer.stop().await;
}

#[tokio::test]
async fn bad_calls_are_told_what_to_do() {
    let indexer = Running::start().await;
    let mut client = IndexClient::new(connect(&indexer).await);
    let rank = Rank::start("kv", 0, 0).await;
    for bad in [
        RegisterRequest { block_size: 0, ..register(1, &rank, 4) },
        RegisterRequest { endpoint: "http://x".to_owned(), ..register(1, &rank, 4) },
        RegisterRequest { endpoint: "tcp://*:5557".to_owned(), ..register(1, &rank, 4) },
        RegisterRequest { replay_endpoint: "x".to_owned(), ..register(1, &rank, 4) },
        RegisterRequest { model: "m".repeat(2_000), ..register(1, &rank, 4) },
    ] {
        let refused = client.register(bad).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(!refused.message().is_empty());
    }
    // More than a message may have.
    let long = OverlapRequest { block_hashes: vec![1; 2 << 20], ..question(0, &[]) };
    let refused = client.overlap(long).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    // The connection serves on.
    assert_eq!(client.overlap(question(0, &[1, 2, 3, 4])).await.unwrap_err().code(), Code::NotFound);

    let told = Running::with(|config| config.knowledge = kvlane_server::indexer::Knowledge::Decisions).await;
    let mut client = IndexClient::new(connect(&told).await);
    let refused = client.register(register(1, &rank, 4)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(!client.describe(DescribeRequest::default()).await.unwrap().into_inner().events);
    told.stop().await;
    indexer.stop().await;
}

#[tokio::test]
async fn tools_find_out_what_is_served_and_whether_it_is_well() {
    let indexer = Running::start().await;
    let channel = connect(&indexer).await;
    let ask = HealthCheckRequest { service: "kvlane.index.v1.Index".to_owned() };
    let health = HealthClient::new(channel.clone()).check(ask).await.unwrap().into_inner();
    assert_eq!(health.status, 1, "serving");
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(futures_util::stream::iter([list]))
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(listed)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services");
    };
    let names: Vec<&str> = listed.service.iter().map(|s| s.name.as_str()).collect();
    assert!(
        names.contains(&"kvlane.index.v1.Index") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    indexer.stop().await;
}

#[tokio::test]
async fn half_a_greeting_and_garbage_keep_nobody_else_waiting() {
    let indexer = Running::start().await;
    let mut held = Vec::new();
    for said in [&b""[..], b"P", b"PRI", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut stream = tokio::net::TcpStream::connect(indexer.at).await.unwrap();
        stream.write_all(said).await.unwrap();
        held.push(stream);
    }
    let mut garbage = tokio::net::TcpStream::connect(indexer.at).await.unwrap();
    garbage.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff").await.unwrap();
    // Whatever is said to it before, it is hung up on.
    let mut said = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), garbage.read_to_end(&mut said)).await;
    ended.expect("it ends").ok();
    // A request that comes in two pieces is one all the same.
    let mut slow = tokio::net::TcpStream::connect(indexer.at).await.unwrap();
    slow.write_all(b"P").await.unwrap();
    tokio::task::yield_now().await;
    let rest = b"OST /query HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
    slow.write_all(rest).await.unwrap();
    let mut said = String::new();
    slow.read_to_string(&mut said).await.unwrap();
    assert!(said.starts_with("HTTP/1.1 422"), "{said}");
    assert_eq!(post(indexer.at, "/query", &json!({})).await.status, 422);
    indexer.stop().await;
    drop(held);
}
