//! The doctor finds what hinders, and says which flag mends it.

use crate::support::{Http, Rank, Says, publishing_vllm, stored, vllm};
use axum::routing::post;
use axum::{Json, Router};
use kvlane_server::doctor::{Report, Severity, examine};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use tokio::sync::Mutex;

/// What a finding about `about` says, with its severity and fix.
fn found<'a>(report: &'a Report, about: &str) -> Vec<(Severity, &'a str, &'a str)> {
    let of = report.findings.iter().filter(|f| f.about == about);
    of.map(|f| (f.severity, f.text.as_str(), f.fix.as_deref().unwrap_or_default())).collect()
}

/// `/v1/completions` that publishes each new prompt and reports what it has.
fn completions(rank: Arc<Mutex<Rank>>, publishes_as: u32, reports: bool) -> Router {
    let seen: Arc<Mutex<HashSet<Vec<u32>>>> = Arc::default();
    Router::new().route(
        "/v1/completions",
        post(async move |Json(body): Json<Value>| {
            let tokens: Vec<u32> = serde_json::from_value(body["prompt"].clone()).expect("token ids");
            let known = !seen.lock().await.insert(tokens.clone());
            let whole = tokens.len() / 8 * 8;
            if !known {
                rank.lock().await.publish(&[stored(1, &tokens[..whole], publishes_as)]).await;
            }
            let cached = if known { whole } else { 0 };
            let details = if reports { json!({"cached_tokens": cached}) } else { Value::Null };
            Json(json!({"choices": [], "usage": {"prompt_tokens": tokens.len(), "prompt_tokens_details": details}}))
        }),
    )
}

async fn trial(publishes_as: u32, reports: bool) -> Report {
    let mut rank = Rank::start("kv", 0, 0).await;
    rank.publish(&[]).await;
    let says = Says { sources: Some(json!({"0": rank.source()})), ..vllm("m", 8, 1e9) };
    let more = completions(Arc::new(Mutex::new(rank)), publishes_as, reports);
    let http = Http::start_with(says, 0, more).await;
    examine(&http.url().parse().expect("a URL"), true).await
}

#[tokio::test]
async fn a_well_kept_engine_has_no_findings() {
    let report = trial(8, true).await;
    assert_eq!(report.worst(), Severity::Fine, "{report:#?}");
    assert!(found(&report, "replay")[0].1.contains("all 1 batches"), "{report:#?}");
    assert!(found(&report, "cached tokens")[0].1.contains("16 tokens came from the cache"), "{report:#?}");
}

#[tokio::test]
async fn another_block_size_and_missing_reports_are_found_by_trial() {
    let report = trial(4, false).await;
    let fixes: Vec<&str> = report.findings.iter().filter_map(|f| f.fix.as_deref()).collect();
    assert_eq!(fixes, ["--worker URL,block-size=4", "--enable-prompt-tokens-details"], "{report:#?}");
    assert_eq!(report.worst(), Severity::Problem);
}

#[tokio::test]
async fn missing_flags_are_named() {
    let off = "vllm:cache_config_info{block_size=\"4\",enable_prefix_caching=\"False\",engine=\"0\"} 1.0\n";
    let http = Http::start(Says { metrics: off.to_owned(), ..vllm("m", 4, 1e9) }, 0).await;
    let report = examine(&http.url().parse().expect("a URL"), false).await;
    assert_eq!(
        found(&report, "prefix cache"),
        [(Severity::Problem, "is switched off", "--enable-prefix-caching")]
    );
    let (severity, _, fix) = found(&report, "events")[0];
    assert!(severity == Severity::Problem && fix.starts_with("--kv-events-config '{"), "{report:#?}");
    assert_eq!(found(&report, "restarts")[0].0, Severity::Hint);
}

#[tokio::test]
async fn a_publisher_that_forgot_its_beginning_and_one_that_is_gone_are_found() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    for _ in 0..5 {
        rank.publish(&[]).await;
    }
    rank.retain_last(2);
    let spec = http.url().parse().expect("a URL");
    let report = examine(&spec, false).await;
    assert!(found(&report, "replay")[0].2.contains("buffer_steps"), "{report:#?}");
    rank.stop().await;
    let report = examine(&spec, false).await;
    assert_eq!(report.worst(), Severity::Problem, "{report:#?}");
    assert!(found(&report, "events")[0].2.contains("kv-events=tcp://HOST:PORT"), "{report:#?}");
}

#[tokio::test]
async fn what_is_no_engine_is_one_problem() {
    let http = Http::start(Says { models: json!([]), ..vllm("m", 4, 1e9) }, 0).await;
    let report = examine(&http.url().parse().expect("a URL"), true).await;
    assert_eq!(report.findings.len(), 1);
    assert!(report.findings[0].text.contains("is not an engine"));
}
