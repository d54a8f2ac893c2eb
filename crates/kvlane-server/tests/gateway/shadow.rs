//! Policies that look on: they choose for every request and change nothing.

use crate::client::{bytes, header, router};
use crate::engine::{Act, Engine};
use crate::url;

#[tokio::test]
async fn what_others_would_have_done_is_told_and_changes_nothing() {
    let first = Engine::start(Act::Json(200, "{}".into())).await;
    let second = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&first), url(&second)], |config| {
        config.shadows = vec!["kv".parse().unwrap(), "sticky-session".parse().unwrap()];
    })
    .await;
    let tokens: Vec<String> = (0..64).map(|t| t.to_string()).collect();
    let body = format!(r#"{{"model":"m","prompt":[{}]}}"#, tokens.join(","));
    let mut held = Vec::new();
    for at in 0..4 {
        let response = router.post("/v1/completions", &body).await;
        let id = header(response.headers(), "x-kvlane-request-id").to_owned();
        bytes(response).await;
        router.quiet().await;
        let why = router.json(&format!("/kvlane/explain/{id}")).await;
        assert_eq!(why["policy"], "round-robin");
        let shadows = why["shadows"].as_array().unwrap();
        assert_eq!((shadows[0]["policy"].as_str(), shadows.len()), (Some("kv"), 2), "{why}");
        assert_eq!(shadows[0]["same"], shadows[0]["worker"] == why["worker"], "{why}");
        // The first request's placement is remembered, also under a policy that is blind to it.
        held.push(shadows[0]["cached_tokens"].as_u64().unwrap());
        assert_eq!(held[at] > 0, at > 0, "{held:?}");
    }
    assert_eq!((first.seen().len(), second.seen().len()), (2, 2), "round robin acted");
    let metrics = router.metrics().await;
    let sum = |name: &str| -> f64 {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    assert_eq!(sum(r#"kvlane_policy_choices_total{policy="round-robin",role="acting",same="true"}"#), 4.0);
    assert_eq!(sum(r#"kvlane_policy_choices_total{policy="kv",role="shadow""#), 4.0, "{metrics}");
    let cached = sum(r#"kvlane_policy_cached_tokens_total{policy="kv",role="shadow"}"#);
    assert_eq!(cached, held.iter().sum::<u64>() as f64);
    router.end().await;
}
