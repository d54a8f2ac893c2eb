//! The mock over real sockets: does it speak as a recorded vLLM spoke, and does it fail as asked?

use super::faults::Faults;
use super::{Args, Config, MockEngine};
use crate::demo::client::Client;
use bytes::Bytes;
use clap::Parser;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use kvlane_prompt::{Endpoint, ModelPrompt, PromptConfig, RequestFields};
use serde_json::{Value, json};
use std::time::Duration;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

const CHAT: &str = include_str!("../../../kvlane-engine/tests/captures/01-stored-root-and-chained.jsonl");
const COMPLETIONS: &str =
    include_str!("../../../kvlane-engine/tests/captures/02-completions-text-and-token-ids.jsonl");

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// The settings of a mock that takes no time, with these arguments.
pub(crate) fn config(arguments: &[&str]) -> Config {
    let fixed = ["mock", "--listen", "127.0.0.1:0", "--block-size", "32", "--speed", "0"];
    let cli = Cli::try_parse_from(fixed.iter().chain(arguments)).expect("valid arguments");
    Config::from(cli.args)
}

/// A mock that takes no time, with these arguments.
async fn mock(arguments: &[&str]) -> (MockEngine, Client) {
    let engine = MockEngine::start(config(arguments)).await.expect("free ports");
    let client = Client::new(engine.url());
    (engine, client)
}

async fn ask(client: &Client, path: &str, body: Value) -> (StatusCode, Value) {
    let response = client.send(Method::POST, path, Some(&body)).await.expect("an answer");
    let status = response.status();
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

/// The events of a streamed answer.
async fn stream(client: &Client, path: &str, body: Value) -> Vec<Value> {
    let response = client.send(Method::POST, path, Some(&body)).await.expect("an answer");
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
    let text = String::from_utf8(bytes.to_vec()).expect("text");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let events = text.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    events.map(|event| serde_json::from_str(&format!("{{{event}")).expect("JSON")).collect()
}

fn completion(prompt: impl Into<Value>, max_tokens: u32) -> Value {
    json!({"model": "mock", "prompt": prompt.into(), "max_tokens": max_tokens, "ignore_eos": true})
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("reported")
}

/// Recorded requests with their answers.
fn recorded(capture: &str) -> Vec<(Value, Value)> {
    let lines: Vec<Value> = capture.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let of = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).cloned().collect::<Vec<_>>();
    of("request").into_iter().zip(of("response")).collect()
}

/// A recorded request as the mock can take it: its model, and tokens of its vocabulary.
fn adapted(request: &Value) -> Value {
    fn small(value: &mut Value) {
        match value {
            Value::Array(values) => values.iter_mut().for_each(small),
            Value::Number(number) => *value = (number.as_u64().unwrap_or(0) % 256).into(),
            _ => {}
        }
    }
    let mut body = request["body"].clone();
    body["model"] = "mock".into();
    body["ignore_eos"] = true.into();
    small(&mut body["prompt"]);
    if body["prompt"].is_null() {
        body.as_object_mut().expect("an object").remove("prompt");
    }
    body
}

/// Checks that two values have the same keys in the same order, and lists of the same kinds of things.
fn same_shape(ours: &Value, theirs: &Value, path: &str) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let keys = |map: &serde_json::Map<String, Value>| map.keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(ours), keys(theirs), "keys of {path}");
            for (key, ours) in ours {
                same_shape(ours, &theirs[key], &format!("{path}.{key}"));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.is_empty(), theirs.is_empty(), "{path}");
            for (ours, theirs) in ours.iter().zip(theirs) {
                same_shape(ours, theirs, &format!("{path}[]"));
            }
        }
        _ => assert_eq!(
            std::mem::discriminant(ours),
            std::mem::discriminant(theirs),
            "{path}: ours {ours}, recorded {theirs}"
        ),
    }
}

#[tokio::test]
async fn answers_have_the_recorded_shape() {
    let (_engine, client) = mock(&[]).await;
    let mut compared = 0;
    for (request, response) in recorded(CHAT).into_iter().chain(recorded(COMPLETIONS)) {
        let path = request["path"].as_str().expect("a path");
        let note = request["note"].as_str().unwrap_or("");
        if response["body"].is_array() {
            let ours = stream(&client, path, adapted(&request)).await;
            let theirs = response["body"].as_array().expect("chunks");
            assert_eq!(ours.len(), theirs.len(), "chunks of: {note}");
            for (ours, theirs) in ours.iter().zip(theirs) {
                same_shape(ours, theirs, note);
            }
        } else {
            let (status, ours) = ask(&client, path, adapted(&request)).await;
            assert_eq!(u64::from(status.as_u16()), response["status"].as_u64().expect("a status"));
            same_shape(&ours, &response["body"], note);
        }
        compared += 1;
    }
    assert_eq!(compared, 11);
}

#[tokio::test]
async fn token_id_prompts_hit_as_recorded() {
    let (_engine, client) = mock(&[]).await;
    let mut compared = 0;
    for (request, response) in recorded(COMPLETIONS) {
        if !request["body"]["prompt"].is_array() {
            continue;
        }
        let (_, ours) = ask(&client, "/v1/completions", adapted(&request)).await;
        assert_eq!(cached(&ours), cached(&response["body"]), "{}", request["note"]);
        compared += 1;
    }
    assert_eq!(compared, 4);
}

#[tokio::test]
async fn a_conversation_finds_its_own_beginning() {
    let (_engine, client) = mock(&[]).await;
    let mut messages = vec![json!({"role": "user", "content": "word ".repeat(100)})];
    let chat = |messages: &[Value]| json!({"model": "mock", "messages": messages, "max_tokens": 500});
    let (_, first) = ask(&client, "/v1/chat/completions", chat(&messages)).await;
    assert_eq!((cached(&first), &first["choices"][0]["finish_reason"]), (0, &json!("stop")));
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": [{"type": "text", "text": "and?"}]}));
    let (_, second) = ask(&client, "/v1/chat/completions", chat(&messages)).await;
    let known = first["usage"]["total_tokens"].as_u64().expect("counted") - 1;
    assert_eq!(cached(&second), known / 32 * 32, "prompt and answer, in whole blocks");
}

#[tokio::test]
async fn adapters_salts_and_ranks_have_caches_of_their_own() {
    let (_engine, client) = mock(&["--lora", "ad", "--ranks", "2"]).await;
    let prompt: Vec<u32> = (0..100).collect();
    let variants = [
        json!({}),
        json!({"model": "ad"}),
        json!({"cache_salt": "s"}),
        json!({"cache_salt": "t"}),
        json!({"model": "ad", "cache_salt": "s"}),
    ];
    for rank in ["0", "1"] {
        for round in 0..2 {
            for variant in &variants {
                let mut body = completion(prompt.clone(), 1);
                for (key, value) in variant.as_object().expect("an object") {
                    body[key] = value.clone();
                }
                let answer = pinned(&client, rank, &body).await.1;
                assert_eq!(cached(&answer), round * 96, "rank {rank}, round {round}, {variant}");
            }
        }
    }
    let (status, refusal) = pinned(&client, "7", &completion(prompt, 1)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(
        refusal["error"],
        json!({"message": "data_parallel_rank 7 is out of range [0, 2).", "type": "BadRequestError",
               "param": null, "code": 400})
    );
}

async fn pinned(client: &Client, rank: &str, body: &Value) -> (StatusCode, Value) {
    let headers = [("x-data-parallel-rank", rank)];
    let response =
        client.send_with(Method::POST, "/v1/completions", &headers, Some(body)).await.expect("an answer");
    let status = response.status();
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
    (status, serde_json::from_slice(&bytes).expect("JSON"))
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let (_engine, client) = mock(&["--max-model-len", "64"]).await;
    let refused = [
        (json!({"model": "nope", "prompt": "x"}), 404, "NotFoundError"),
        (json!({"model": "mock"}), 400, "Bad Request"),
        (json!({"model": "mock", "prompt": []}), 400, "BadRequestError"),
        (json!({"model": "mock", "prompt": [131_072]}), 400, "BadRequestError"),
        (json!({"model": "mock", "prompt": "x", "max_tokens": 0}), 400, "BadRequestError"),
        (json!({"model": "mock", "prompt": "x", "max_tokens": 64}), 400, "BadRequestError"),
        (json!({"model": "mock", "prompt": "x".repeat(64)}), 400, "BadRequestError"),
        (json!({"model": "mock", "prompt": "x", "n": 1_000}), 400, "BadRequestError"),
    ];
    for (body, code, kind) in refused {
        let (status, refusal) = ask(&client, "/v1/completions", body.clone()).await;
        assert_eq!((status.as_u16(), &refusal["error"]["type"]), (code, &json!(kind)), "{body}");
        assert_eq!(refusal["error"]["code"], code);
    }
    assert_eq!(
        ask(&client, "/nowhere", json!({})).await,
        (StatusCode::NOT_FOUND, json!({"detail": "Not Found"}))
    );
}

/// A subscriber of an engine's first rank.
async fn subscribe(engine: &MockEngine) -> SubSocket {
    let mut socket = SubSocket::new();
    socket.connect(&engine.events()[0].0).await.expect("a bound event socket");
    socket.subscribe("").await.expect("a connected socket");
    // Nothing tells a subscriber that its subscription has arrived.
    tokio::time::sleep(Duration::from_millis(300)).await;
    socket
}

async fn receive(socket: &mut impl SocketRecv) -> Vec<Bytes> {
    let message = tokio::time::timeout(PATIENCE, socket.recv()).await.expect("in time").expect("a message");
    message.into_vec()
}

fn number(frame: &Bytes) -> u64 {
    u64::from_be_bytes(frame.as_ref().try_into().expect("8 bytes"))
}

/// Everything that an engine's first rank still has from `from` on: (sequence number, payload).
async fn replay(engine: &MockEngine, from: u64) -> Vec<(u64, Bytes)> {
    let mut socket = DealerSocket::new();
    socket.connect(&engine.events()[0].1).await.expect("a bound replay socket");
    let request = vec![Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())];
    socket.send(ZmqMessage::try_from(request).expect("two frames")).await.expect("a connected socket");
    let mut batches = Vec::new();
    loop {
        let frames = receive(&mut socket).await;
        let [empty, _topic, sequence, payload] = frames.as_slice() else {
            panic!("4 frames, not {}", frames.len())
        };
        assert!(empty.is_empty());
        if payload.is_empty() {
            assert_eq!(number(sequence), u64::MAX, "the end marker");
            return batches;
        }
        batches.push((number(sequence), payload.clone()));
    }
}

#[tokio::test]
async fn events_are_published_and_replayed() {
    let (engine, client) = mock(&["--topic", "kv", "--buffer-steps", "4"]).await;
    let mut subscriber = subscribe(&engine).await;
    let mut live = Vec::new();
    for i in 0..6u32 {
        ask(&client, "/v1/completions", completion(vec![i; 40], 1)).await;
        let frames = receive(&mut subscriber).await;
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[0], "kv");
        live.push((number(&frames[1]), frames[2].clone()));
    }
    assert_eq!(live.iter().map(|batch| batch.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(replay(&engine, 0).await, live[2..], "the last four, as published");
    assert_eq!(replay(&engine, 5).await, live[5..]);
    assert_eq!(replay(&engine, 6).await, []);
    let payload = |i: usize| live[i].1.windows(11).any(|window| window == b"BlockStored");
    assert!((0..6).all(payload));
}

#[tokio::test]
async fn a_reset_is_announced_with_the_next_step() {
    let (engine, client) = mock(&[]).await;
    ask(&client, "/v1/completions", completion(vec![1; 40], 1)).await;
    assert_eq!(ask(&client, "/reset_prefix_cache", json!({})).await.1, json!({"success": true}));
    assert_eq!(replay(&engine, 0).await.len(), 1, "nothing yet");
    ask(&client, "/v1/completions", completion(vec![1; 40], 1)).await;
    let batches = replay(&engine, 0).await;
    assert_eq!(batches.len(), 2);
    let says = |what: &[u8]| batches[1].1.windows(what.len()).position(|window| window == what);
    assert!(says(b"AllBlocksCleared") < says(b"BlockStored"));
}

#[tokio::test]
async fn lost_events_are_lost_live_and_kept_for_replay() {
    let (engine, client) =
        mock(&["--fault-drop", "0.5", "--fault-duplicate", "0.3", "--fault-seed", "7"]).await;
    let mut subscriber = subscribe(&engine).await;
    for i in 0..40u32 {
        ask(&client, "/v1/completions", completion(vec![i; 40], 1)).await;
    }
    let (status, _) = ask(&client, "/mock/faults", json!({})).await;
    assert_eq!(status, StatusCode::OK);
    ask(&client, "/v1/completions", completion(vec![41; 40], 1)).await;
    let mut live = Vec::new();
    while live.last() != Some(&40) {
        live.push(number(&receive(&mut subscriber).await[1]));
    }
    let kept: Vec<u64> = replay(&engine, 0).await.iter().map(|batch| batch.0).collect();
    assert_eq!(kept, (0..=40).collect::<Vec<_>>());
    let lost = kept.iter().filter(|sequence| !live.contains(sequence)).count();
    let twice = kept.iter().filter(|sequence| live.iter().filter(|l| l == sequence).count() == 2).count();
    assert!((10..30).contains(&lost), "{lost} lost");
    assert!((1..20).contains(&twice), "{twice} twice");
}

#[tokio::test]
async fn overtaken_events_follow_their_successor() {
    let (engine, client) =
        mock(&["--fault-reorder", "0.5", "--fault-delay-ms", "5", "--fault-seed", "3"]).await;
    let mut subscriber = subscribe(&engine).await;
    for i in 0..20u32 {
        ask(&client, "/v1/completions", completion(vec![i; 40], 1)).await;
    }
    ask(&client, "/mock/faults", json!({})).await;
    ask(&client, "/v1/completions", completion(vec![21; 40], 1)).await;
    let mut live = Vec::new();
    while live.len() < 21 {
        live.push(number(&receive(&mut subscriber).await[1]));
    }
    assert!(live.windows(2).any(|pair| pair[0] == pair[1] + 1), "{live:?}");
    live.sort_unstable();
    assert_eq!(live, (0..=20).collect::<Vec<_>>());
}

/// The value of a metric of rank 0.
async fn metric(client: &Client, name: &str) -> f64 {
    let response = client.send(Method::GET, "/metrics", None).await.expect("an answer");
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
    let text = String::from_utf8(bytes.to_vec()).expect("text");
    let line = text.lines().find(|line| line.starts_with(name)).expect("the metric");
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

/// Waits until `metric` is `value`.
async fn until(client: &Client, name: &str, value: f64) {
    let reached = async {
        while (metric(client, name).await - value).abs() > f64::EPSILON {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{name} is never {value}"));
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request() {
    for streamed in [true, false] {
        // Slow enough never to end by itself.
        let (engine, client) = mock(&["--speed", "0.01"]).await;
        let mut body = completion("x", 1_000);
        body["stream"] = streamed.into();
        let asking = {
            let client = Client::new(engine.url());
            tokio::spawn(async move {
                let response = client.send(Method::POST, "/v1/completions", Some(&body)).await;
                if let Ok(response) = response {
                    let _ = response.into_body().collect().await;
                }
            })
        };
        until(&client, "vllm:num_requests_running", 1.0).await;
        asking.abort();
        until(&client, "vllm:num_requests_running", 0.0).await;
    }
}

#[tokio::test]
async fn a_restart_forgets_everything_on_the_same_ports() {
    let (engine, client) = mock(&[]).await;
    for i in 0..3u32 {
        ask(&client, "/v1/completions", completion(vec![i; 40], 1)).await;
    }
    let before = metric(&client, "process_start_time_seconds").await;
    let (status, _) = ask(&client, "/mock/restart", json!({"down_ms": 50})).await;
    assert_eq!(status, StatusCode::OK);
    let back = async {
        // The old life may still answer for a moment.
        loop {
            let client = Client::new(engine.url());
            if client.status("/health").await.is_ok() && metric(&client, "process_start").await > before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, back).await.expect("it comes back");
    let (_, answer) = ask(&client, "/v1/completions", completion(vec![0; 40], 1)).await;
    assert_eq!(cached(&answer), 0, "an empty cache");
    assert_eq!(replay(&engine, 0).await.iter().map(|batch| batch.0).collect::<Vec<_>>(), [0]);
}

#[tokio::test]
async fn streams_break_off_on_request() {
    let (_engine, client) = mock(&["--fault-die-mid-stream", "1"]).await;
    let mut body = completion("x", 50);
    body["stream"] = true.into();
    let response = client.send(Method::POST, "/v1/completions", Some(&body)).await.expect("a beginning");
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.into_body().collect().await.is_err(), "broken off before its end");
    body["stream"] = false.into();
    assert_eq!(ask(&client, "/v1/completions", body).await.0, StatusCode::OK, "whole answers are spared");
    until(&client, "vllm:num_requests_running", 0.0).await;
}

#[tokio::test]
async fn the_model_directory_tokenizes_as_the_mock_does() {
    let directory = std::env::temp_dir().join(format!("kvlane-mock-model-{}", std::process::id()));
    let (_engine, client) = mock(&["--model-dir", directory.to_str().expect("text")]).await;
    let model = ModelPrompt::load(&directory, PromptConfig::default()).expect("a model directory");
    let chats = [
        json!([{"role": "user", "content": "hello"}]),
        json!([{"role": "system", "content": "Å <|im_end|> <|im_sta"}, {"role": "user", "content": " \n\n x "},
               {"role": "assistant", "content": "日本 🙂"}, {"role": "user", "content": "\u{0}\u{7f}\u{ad}"}]),
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    ];
    for messages in chats {
        let body = json!({"model": "mock", "messages": messages});
        let fields =
            RequestFields::parse(Endpoint::Chat, Bytes::from(body.to_string())).expect("a readable request");
        let local = model.tokens(&fields, 0).expect("a prompt");
        let (_, theirs) = ask(&client, "/tokenize", body).await;
        let theirs: Vec<u32> = serde_json::from_value(theirs["tokens"].clone()).expect("tokens");
        assert_eq!(local.len(), 1);
        assert_eq!(local[0].tokens, theirs, "{messages}");
    }
    std::fs::remove_dir_all(&directory).expect("it was written");
}

#[test]
fn faults_are_read_with_what_is_not_named_off() {
    let faults: Faults = serde_json::from_value(json!({"drop": 0.5})).expect("faults");
    assert_eq!(faults, Faults { drop: 0.5, ..Faults::default() });
    assert!(serde_json::from_value::<Faults>(json!({"dorp": 0.5})).is_err());
}

/// A prefill for another engine is answered with the place of its blocks, and only a whole place can be fetched from.
#[tokio::test]
async fn blocks_are_handed_over_by_kv_transfer_params() {
    let (_engine, client) = mock(&[]).await;
    let mut body = completion(vec![7; 70], 1);
    body["kv_transfer_params"] = json!({"do_remote_decode": true, "do_remote_prefill": false});
    let (status, answer) = ask(&client, "/v1/completions", body).await;
    let place = answer["kv_transfer_params"].clone();
    assert_eq!((status, &place["do_remote_prefill"]), (StatusCode::OK, &json!(true)), "{answer}");
    assert_eq!(place["remote_block_ids"][0].as_array().map(Vec::len), Some(3), "70 tokens in blocks of 32");
    let mut body = completion(vec![7; 70], 4);
    body["kv_transfer_params"] = place.clone();
    let (status, answer) = ask(&client, "/v1/completions", body.clone()).await;
    assert_eq!((status, &answer["kv_transfer_params"]), (StatusCode::OK, &Value::Null));
    for field in ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"] {
        body["kv_transfer_params"] = place.clone();
        body["kv_transfer_params"].as_object_mut().expect("an object").remove(field);
        let (status, answer) = ask(&client, "/v1/completions", body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "without {field}: {answer}");
    }
}
