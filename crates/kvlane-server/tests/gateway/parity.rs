//! Tokens computed here against the engine's: found out before the first request, told, and healed.

use crate::client::{json, router};
use crate::engine::{Act, Engine, Tokenize};
use crate::{CHAT, url};
use bytes::Bytes;
use kvlane_prompt::{Endpoint, ModelPrompt, PromptConfig, RequestFields};
use kvlane_server::TokenizerSetting;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn files() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kvlane-prompt/tests/models/llama3-like")
}

/// An engine that tokenizes as the files say, but adds a token to chats while `wrong`.
fn engine_tokens(wrong: &Arc<AtomicBool>) -> Tokenize {
    let model = ModelPrompt::load(&files(), PromptConfig::default()).unwrap();
    let wrong = Arc::clone(wrong);
    Arc::new(move |body: &Bytes| {
        let chat = RequestFields::parse(Endpoint::Chat, body.clone());
        let is_chat = chat.is_ok();
        let request = chat.or_else(|_| RequestFields::parse(Endpoint::Completions, body.clone())).unwrap();
        let mut tokens = model.tokens(&request, 0).unwrap().remove(0).tokens;
        if is_chat && wrong.load(Ordering::Relaxed) {
            tokens.push(7);
        }
        tokens
    })
}

#[tokio::test]
async fn another_template_is_found_before_the_first_request_and_heals() {
    let wrong = Arc::new(AtomicBool::new(true));
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    engine.tokenize(engine_tokens(&wrong));
    let router = router(&[url(&engine)], |config| {
        config.policy = "kv".parse().unwrap();
        config.tokenizer = TokenizerSetting::Path(files());
    })
    .await;
    let ready = router.json("/ready").await;
    assert_eq!(ready["models"][0]["tokens_from"], "engine", "{ready}");
    let difference = ready["models"][0]["tokens_differ"].as_str().unwrap();
    assert!(difference.starts_with("the chat template differs: "), "{difference}");
    assert!(router.metrics().await.contains(r#"kvlane_tokenizer{model="m",kind="engine"} 1"#));
    let explained = router.post("/v1/chat/completions", CHAT).await;
    let path =
        format!("/kvlane/explain/{}", crate::client::header(explained.headers(), "x-kvlane-request-id"));
    assert_eq!(router.json(&path).await["tokens_from"], "engine");

    wrong.store(false, Ordering::Relaxed);
    let mut asked = 0;
    while router.json("/kvlane/workers").await["workers"][0]["tokens_from"] != "local" {
        asked += 1;
        assert!(asked < 500, "{}", router.metrics().await);
        // Each its own text: the engine's answers are remembered.
        let body = CHAT.replace("hi", &format!("hi {asked}"));
        assert_eq!(router.post("/v1/chat/completions", &body).await.status(), 200);
    }
    router.end().await;
}

#[tokio::test]
async fn equal_tokens_are_used_and_counted() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    engine.tokenize(engine_tokens(&Arc::default()));
    let router = router(&[url(&engine)], |config| {
        config.policy = "kv".parse().unwrap();
        config.tokenizer = TokenizerSetting::Path(files());
    })
    .await;
    let worker = router.json("/kvlane/workers").await["workers"][0].clone();
    assert_eq!((worker["tokens_from"].as_str(), worker["tokens_differ"].as_str()), (Some("local"), None));
    let metrics = router.metrics().await;
    assert!(metrics.contains(r#"kvlane_token_checks_total{model="m",kind="equal"} 3"#), "{metrics}");
    router.end().await;
}

#[tokio::test]
async fn a_dry_run_tells_which_tokens_it_went_by() {
    let wrong = Arc::new(AtomicBool::new(false));
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    engine.tokenize(engine_tokens(&wrong));
    let mut found = Vec::new();
    for (tokenizer, differs) in [
        (TokenizerSetting::Path(files()), false),
        (TokenizerSetting::Engine, false),
        (TokenizerSetting::Engine, true),
    ] {
        wrong.store(differs, Ordering::Relaxed);
        let router = router(&[url(&engine)], |config| {
            config.policy = "kv".parse().unwrap();
            config.tokenizer = tokenizer;
        })
        .await;
        found.push(json(router.post("/kvlane/explain", CHAT).await).await);
        router.end().await;
    }
    assert_eq!((&found[0]["tokens_from"], &found[1]["tokens_from"]), (&"local".into(), &"engine".into()));
    assert!(found[0]["tokens_hash"].is_string(), "{}", found[0]);
    assert_eq!(found[0]["tokens_hash"], found[1]["tokens_hash"]);
    assert_ne!(found[1]["tokens_hash"], found[2]["tokens_hash"]);
}

#[tokio::test]
async fn another_engine_is_asked_where_one_cannot_be_reached() {
    let right = Arc::new(AtomicBool::new(false));
    let engines =
        [Engine::start(Act::Json(200, "{}".into())).await, Engine::start(Act::Json(200, "{}".into())).await];
    engines.iter().for_each(|engine| engine.tokenize(engine_tokens(&right)));
    let router = router(&engines.each_ref().map(url), |config| {
        config.policy = "kv".parse().unwrap();
        config.tokenizer = TokenizerSetting::Engine;
        // Nobody tells the router.
        config.fleet.probe_interval = Duration::from_secs(600);
    })
    .await;
    engines[0].kill();
    for i in 0..4 {
        // Each its own text: the engine's answers are remembered.
        let why = json(router.post("/kvlane/explain", &CHAT.replace("hi", &format!("hi {i}"))).await).await;
        assert_eq!(why["tokens_from"], "engine", "{why}");
    }
    router.end().await;
}
