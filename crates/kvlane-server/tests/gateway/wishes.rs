//! Where requests must and would rather go: labels, names, ranks, drained workers, adapters, sessions.

use crate::client::{Router, bytes, header, json, router};
use crate::engine::{Act, Engine};
use crate::{CHAT, url};
use hyper::Method;
use serde_json::json;

async fn engines(count: usize) -> Vec<Engine> {
    let mut engines = Vec::new();
    for _ in 0..count {
        engines.push(Engine::start(Act::Json(200, "{}".into())).await);
    }
    engines
}

fn name(engine: &Engine) -> String {
    engine.address.to_string()
}

/// Who answers a chat with these headers; the status where nobody does.
async fn who(router: &Router, headers: &[(&str, &str)], body: &str) -> Result<String, (u16, String)> {
    let response = router.send(Method::POST, "/v1/chat/completions", headers, body.as_bytes()).await;
    let status = response.status().as_u16();
    if status != 200 {
        let error = json(response).await;
        return Err((status, error["error"]["message"].as_str().unwrap().to_owned()));
    }
    let worker = header(response.headers(), "x-kvlane-worker").to_owned();
    bytes(response).await;
    router.quiet().await;
    Ok(worker)
}

/// All who answer when it is asked so often.
async fn all(router: &Router, times: usize, headers: &[(&str, &str)], body: &str) -> Vec<String> {
    let mut all = Vec::new();
    for _ in 0..times {
        all.push(who(router, headers, body).await.unwrap());
    }
    all.sort();
    all.dedup();
    all
}

fn sorted(engines: &[&Engine]) -> Vec<String> {
    let mut names: Vec<String> = engines.iter().map(|engine| name(engine)).collect();
    names.sort();
    names
}

#[tokio::test]
async fn labels_are_required_or_preferred() {
    let e = engines(3).await;
    let workers = [
        format!("{},label=zone=a,label=gpu=h100", url(&e[0])),
        format!("{},label=zone=a", url(&e[1])),
        format!("{},label=zone=b", url(&e[2])),
    ];
    let router = router(&workers, |config| config.policy = "kv".parse().unwrap()).await;
    let listed = router.json("/kvlane/workers").await;
    assert_eq!(listed["workers"][0]["labels"], json!(["zone=a", "gpu=h100"]));
    let require = |labels| [("x-kvlane-require", labels)];
    assert_eq!(all(&router, 4, &require("zone=a, gpu=h100"), CHAT).await, sorted(&[&e[0]]));
    assert_eq!(all(&router, 4, &require("zone=b"), CHAT).await, sorted(&[&e[2]]));
    assert_eq!(who(&router, &require("zone=c"), CHAT).await.unwrap_err().0, 503);
    assert_eq!(who(&router, &require("zone"), CHAT).await.unwrap_err().0, 400);
    // A preference decides among equals, and is no demand.
    assert_eq!(all(&router, 6, &[("x-kvlane-prefer", "zone=b@5")], CHAT).await, sorted(&[&e[2]]));
    assert_eq!(all(&router, 6, &[("x-kvlane-prefer", "zone=a,gpu=h100")], CHAT).await, sorted(&[&e[0]]));
    // Worth a millisecond, it is less than the queue there.
    e[2].act(Act::Hang);
    let held =
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#, "x".repeat(200_000));
    let busy = [("x-kvlane-prefer", "zone=b@1")];
    let (held, require) = (held.as_bytes(), require("zone=b"));
    let running = router.send(Method::POST, "/v1/chat/completions", &require, held);
    let asking = async {
        while e[2].running() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let response = router.send(Method::POST, "/v1/chat/completions", &busy, CHAT.as_bytes()).await;
        header(response.headers(), "x-kvlane-worker").to_owned()
    };
    let worker = tokio::select! {
        worker = asking => worker,
        _ = running => unreachable!("it hangs"),
    };
    assert_ne!(worker, name(&e[2]));
    router.end().await;
}

#[tokio::test]
async fn named_workers_and_ranks_are_the_only_ones() {
    let e = engines(3).await;
    let workers = [format!("{},ranks=2", url(&e[0])), url(&e[1]), url(&e[2])];
    let router = router(&workers, |_| {}).await;
    let [first, second, third] = [name(&e[0]), name(&e[1]), name(&e[2])];
    let rank = |number: u32| format!("{first}/{number}");
    let only = |names: &str| vec![("x-kvlane-worker", names.to_owned())];
    let ask = async |headers: Vec<(&'static str, String)>| {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut all = Vec::new();
        for _ in 0..6 {
            all.push(who(&router, &headers, CHAT).await?);
        }
        all.sort();
        all.dedup();
        Ok::<_, (u16, String)>(all)
    };
    assert_eq!(ask(only(&second)).await.unwrap(), sorted(&[&e[1]]));
    assert_eq!(ask(only(&first)).await.unwrap(), [rank(0), rank(1)], "an instance is all its ranks");
    assert_eq!(ask(only(&rank(1))).await.unwrap(), [rank(1)]);
    assert_eq!(header(&e[0].seen().last().unwrap().headers, "x-data-parallel-rank"), "1");
    let mut both = vec![second.clone(), third.clone()];
    both.sort();
    assert_eq!(ask(only(&format!("{second}, {third}"))).await.unwrap(), both);
    let with_rank =
        |names: &str, rank: &str| [only(names), vec![("x-data-parallel-rank", rank.to_owned())]].concat();
    assert_eq!(ask(with_rank(&first, "0")).await.unwrap(), [rank(0)]);
    assert_eq!(ask(vec![("x-data-parallel-rank", "1".into())]).await.unwrap(), [rank(1)]);
    for wrong in
        [only("nowhere:1"), with_rank(&rank(1), "0"), with_rank(&second, "7"), with_rank(&second, "x")]
    {
        let (status, message) = ask(wrong.clone()).await.unwrap_err();
        assert_eq!(status, 400, "{wrong:?}: {message}");
    }
    router.end().await;
}

#[tokio::test]
async fn a_drained_worker_gets_nothing_new() {
    let e = engines(2).await;
    let router = router(&[url(&e[0]), url(&e[1])], |config| config.allow_admin = true).await;
    let drain = async |method: Method, worker: &str| {
        let response = router.send(method, "/kvlane/drain", &[("x-kvlane-worker", worker)], b"").await;
        (response.status().as_u16(), json(response).await)
    };
    let [first, second] = [name(&e[0]), name(&e[1])];
    assert_eq!(drain(Method::POST, "nowhere:1").await.0, 400);
    assert_eq!(drain(Method::POST, &first).await, (200, json!({ "worker": first, "draining": true })));
    assert_eq!(all(&router, 6, &[], CHAT).await, sorted(&[&e[1]]));
    let listed = router.json("/kvlane/workers").await;
    assert_eq!(
        (&listed["workers"][0]["draining"], &listed["workers"][1]["draining"]),
        (&json!(true), &json!(false))
    );
    drain(Method::POST, &second).await;
    assert_eq!(who(&router, &[], CHAT).await.unwrap_err().0, 503);
    assert_eq!(drain(Method::DELETE, &first).await.1["draining"], false);
    assert_eq!(all(&router, 6, &[], CHAT).await, sorted(&[&e[0]]));
    router.end().await;

    let closed = crate::client::router(&[url(&e[0])], |_| {}).await;
    let response = closed.send(Method::POST, "/kvlane/drain", &[("x-kvlane-worker", &first)], b"").await;
    assert_eq!(response.status(), 403, "draining is for operators");
    closed.end().await;
}

#[tokio::test]
async fn an_adapter_stays_where_it_is_loaded() {
    let e = engines(4).await;
    let workers: Vec<String> = e.iter().map(url).collect();
    let router = router(&workers, |config| config.policy = "kv".parse().unwrap()).await;
    let adapted = CHAT.replace(r#""m""#, r#""m-lora""#);
    let first = who(&router, &[], &adapted).await.unwrap();
    let then = all(&router, 8, &[], &adapted).await;
    assert_eq!(then, std::slice::from_ref(&first), "loading it elsewhere takes longer");
    let elsewhere = e.iter().map(name).find(|name| *name != first).unwrap();
    who(&router, &[("x-kvlane-worker", &elsewhere)], &adapted).await.unwrap();
    let mut both = vec![first, elsewhere];
    both.sort();
    let then = all(&router, 16, &[], &adapted).await;
    assert!(then.iter().all(|worker| both.contains(worker)), "{then:?} of {both:?}");
    router.end().await;
}

#[tokio::test]
async fn a_session_stays_at_its_worker_by_whatever_header_names_it() {
    let e = engines(4).await;
    let workers: Vec<String> = e.iter().map(url).collect();
    let router = router(&workers, |config| config.policy = "sticky-session".parse().unwrap()).await;
    let mut places = Vec::new();
    for header in ["x-session-id", "x-session-affinity", "x-dynamo-session-id", "x-correlation-id"] {
        for session in ["a", "b", "c", "d"] {
            let place = all(&router, 4, &[(header, &format!("{header}-{session}"))], CHAT).await;
            assert_eq!(place.len(), 1, "{header} {session}: {place:?}");
            places.extend(place);
        }
    }
    places.sort();
    places.dedup();
    assert!(places.len() > 1, "sessions are spread");
    // The first header counts.
    let both = [("x-session-id", "x-session-id-a"), ("x-correlation-id", "x-correlation-id-b")];
    assert_eq!(all(&router, 4, &both, CHAT).await, all(&router, 1, &both[..1], CHAT).await);
    router.end().await;
}
