//! What the service costs over loopback sockets: a new replica's start, and questions of remote schedulers.
//!
//! One process plays all parts: engines (PUB and ROUTER) that publish chains until an indexer holds `PAIRS` pairs, that indexer, and its clients.
//!
//! * `bootstrap`: the engines forget all but their last batch, and a second indexer is started with the first as its peer, while a client asks the
//!   first one all the time. Printed: the time until the second one is in step with all ranks, whether it then answers alike, and latencies of
//!   `/query_by_hash` before and meanwhile.
//! * `remote`: see [`remote`].
//! * `balance`: see [`balance`].
//!
//! `cargo bench -p kvlane-server --bench replicas -- bootstrap|remote [pairs] [ranks]`, or `-- balance LISTEN ROUTER…`

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench: what fails ends it, and its result is what it prints"
)]

mod balance;
mod engines;
mod remote;

use engines::{CHAIN, Client, Engine, begin, question, summary, until_pairs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

#[tokio::main]
async fn main() {
    // cargo adds options of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let number = |at: usize| arguments.get(at).and_then(|arg| arg.parse().ok());
    let ranks = number(2).unwrap_or(16);
    let chains = number(1).unwrap_or(1_000_000) / ranks / CHAIN;
    match arguments.first().map(String::as_str) {
        Some("bootstrap") => bootstrap(chains, ranks).await,
        Some("remote") => remote::measure(chains, ranks).await,
        Some("balance") => {
            let address = |text: &String| text.parse().unwrap();
            balance::run(address(&arguments[1]), arguments[2..].iter().map(address).collect()).await;
        }
        _ => panic!("bootstrap, remote or balance?"),
    }
}

async fn bootstrap(chains: usize, ranks: usize) {
    let all = (chains * ranks * CHAIN) as u64;

    let (old, stop_old) = begin(Vec::new()).await;
    let mut client = Client::connect(old.address()).await;
    let mut engines = Vec::new();
    let began = Instant::now();
    for rank in 0..ranks {
        let engine = Engine::start(rank, chains).await;
        client.ask("POST", "/register", &engine.registration().to_string()).await;
        engines.push(engine);
    }
    until_pairs(&mut client, all).await;
    println!("{all} pairs of {ranks} ranks heard in {:.1} s", began.elapsed().as_secs_f64());
    engines.iter().for_each(Engine::forget);

    let mut alone = Vec::new();
    for i in 0..2_000 {
        let (body, expected) = question(&engines[i % ranks], i * 7 % chains);
        let asked = Instant::now();
        let answer = client.ask("POST", "/query_by_hash", &body).await;
        alone.push(asked.elapsed().as_micros() as u64);
        assert!(answer.starts_with(&expected), "{answer}");
    }
    println!("one client, {CHAIN} blocks, quiet: {}", summary(alone));

    let questions: Vec<(String, String)> =
        (0..256).map(|i| question(&engines[i % ranks], i * 31 % chains)).collect();
    let done = Arc::new(AtomicBool::new(false));
    let (until, address, asked) = (Arc::clone(&done), old.address(), questions.clone());
    let asking = tokio::spawn(async move {
        let mut client = Client::connect(address).await;
        let mut us = Vec::new();
        while !until.load(Ordering::Relaxed) {
            let (body, expected) = &asked[us.len() % asked.len()];
            let asked = Instant::now();
            let answer = client.ask("POST", "/query_by_hash", body).await;
            us.push(asked.elapsed().as_micros() as u64);
            assert!(answer.starts_with(expected), "{answer}");
        }
        us
    });
    let began = Instant::now();
    let (new, stop_new) = begin(vec![format!("http://{}", old.address())]).await;
    let mut fresh = Client::connect(new.address()).await;
    until_pairs(&mut fresh, all).await;
    let took = began.elapsed();
    done.store(true, Ordering::Relaxed);
    println!("a new replica holds all {all} pairs after {:.2} s", took.as_secs_f64());
    println!("the peer answers meanwhile: {}", summary(asking.await.unwrap()));
    for (body, expected) in &questions {
        let answer = fresh.ask("POST", "/query_by_hash", body).await;
        assert!(answer.starts_with(expected), "{answer}");
    }
    println!("and the replica answers {} questions alike", questions.len());
    drop((client, fresh));
    stop_new.cancel();
    stop_old.cancel();
    new.ended().await;
    old.ended().await;
}
