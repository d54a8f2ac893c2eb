//! Streams whose clients leave at random, for as long as told: does anything stay behind?
//!
//! kvlane runs as a process of its own; engines and clients share this one, so that the moment at which a client leaves and the moment at which
//! the engine's side of its request ends are read from one clock. Half of the clients' streams are left somewhere in their middle, by closing the connection; the
//! others are read to their end. Told at the end: how late the engine learnt of a leave, what was still running a second after the last one, and kvlane's
//! memory over time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::net::{TcpListener, TcpStream};

use crate::engine::MODEL;
use crate::http1::{Connection, Length};
use crate::prompts::random;
use crate::routers::{Folder, Kind, Router};

/// Between two tokens of a stream.
const TOKEN_PAUSE: Duration = Duration::from_millis(25);
/// Tokens of a stream, at most.
const TOKENS_MAX: u64 = 60;
/// How late an engine's side of a request may end.
const LATE_MAX: Duration = Duration::from_secs(1);

/// Both sides of the requests that have not ended on both.
#[derive(Default)]
struct Sides {
    left: HashMap<u64, Instant>,
    ended: HashMap<u64, Instant>,
    /// From the client's leave to the engine's end, ms; negative where the stream had just ended by itself.
    late_ms: Vec<f64>,
    running: HashMap<u64, ()>,
    asked: u64,
    whole: u64,
    broken: u64,
}

impl Sides {
    fn match_up(&mut self, id: u64) {
        if let (Some(left), Some(ended)) = (self.left.get(&id), self.ended.get(&id)) {
            self.late_ms.push((ended.saturating_duration_since(*left)).as_secs_f64() * 1e3);
            self.left.remove(&id);
            self.ended.remove(&id);
        }
    }
}

type Shared = Rc<RefCell<Sides>>;

/// Runs it and prints the figures; an error if something stayed behind.
pub fn run(kvlane: &Path, folder: &Folder, clients: u64, time: Duration) -> Result<()> {
    let runtime = crate::runtime()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let sides: Shared = Rc::default();
        let mut ports = Vec::new();
        for _ in 0..2 {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            ports.push(listener.local_addr()?.port());
            let sides = Rc::clone(&sides);
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let sides = Rc::clone(&sides);
                    tokio::task::spawn_local(async move {
                        let _ = serve(stream, &sides).await;
                    });
                }
            });
        }
        let (own, kvlane, ports) = (folder.0.clone(), kvlane.to_owned(), ports);
        let free = [crate::free_port()?, crate::free_port()?];
        // It asks its engines who they are before it answers, and they live on this thread.
        let router = tokio::task::spawn_blocking(move || {
            Router::start(Kind::Kvlane("round-robin"), free, &ports, &Folder(own), &kvlane)
        })
        .await??;
        let start = Instant::now();
        let tasks: Vec<_> = (0..clients)
            .map(|client| {
                let sides = Rc::clone(&sides);
                tokio::task::spawn_local(client_loop(router.address, client, start + time, sides))
            })
            .collect();
        println!("| minute | RSS, MB | streams | left | running |\n|---|---|---|---|---|");
        while start.elapsed() < time {
            let seen = |minute: f64| {
                let sides = sides.borrow();
                println!(
                    "| {minute:.1} | {:.1} | {} | {} | {} |",
                    router.resident_mb(),
                    sides.asked,
                    sides.late_ms.len() + sides.left.len(),
                    sides.running.len()
                );
            };
            tokio::time::sleep((time / 20).min(Duration::from_secs(60))).await;
            seen(start.elapsed().as_secs_f64() / 60.0);
        }
        for task in tasks {
            task.await?;
        }
        tokio::time::sleep(LATE_MAX).await;
        let mut sides = sides.borrow_mut();
        sides.late_ms.sort_by(f64::total_cmp);
        let quantile = |p: f64| sides.late_ms.get(((sides.late_ms.len().max(1) - 1) as f64 * p) as usize).copied();
        println!(
            "{} streams, {} whole, {} left, {} broken; engine's end after the client's leave: p50 {:.1} ms, p99 {:.1} ms, latest {:.1} ms; still running a second later: {}",
            sides.asked,
            sides.whole,
            sides.late_ms.len(),
            sides.broken,
            quantile(0.5).unwrap_or(0.0),
            quantile(0.99).unwrap_or(0.0),
            quantile(1.0).unwrap_or(0.0),
            sides.running.len()
        );
        ensure!(sides.running.is_empty(), "{} requests are stuck", sides.running.len());
        ensure!(quantile(1.0).unwrap_or(0.0) < LATE_MAX.as_secs_f64() * 1e3, "an engine learnt of a leave too late");
        ensure!(sides.broken == 0, "{} streams broke", sides.broken);
        Ok(())
    })
}

fn id_of(first_line: &str) -> Option<u64> {
    first_line.split("?id=").nth(1)?.split(' ').next()?.parse().ok()
}

/// One connection of an engine that takes its time.
async fn serve(stream: TcpStream, sides: &Shared) -> std::io::Result<()> {
    let mut connection = Connection::new(stream)?;
    while let Some(head) = connection.head().await? {
        connection.body(head.length, |_| {}).await?;
        let Some(id) = id_of(&head.first_line) else {
            let models = format!(
                r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model","created":1,"owned_by":"vllm","root":"{MODEL}","parent":null,"max_model_len":262144}}]}}"#
            );
            let (kind, body) = match head.first_line.split(' ').nth(1).unwrap_or_default() {
                "/v1/models" => ("200 OK", models),
                "/health" => ("200 OK", String::new()),
                "/v1/chat/completions" => ("200 OK", "{}".to_owned()),
                _ => ("404 Not Found", "{}".to_owned()),
            };
            let head = format!(
                "HTTP/1.1 {kind}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            connection.write((head + &body).as_bytes()).await?;
            continue;
        };
        sides.borrow_mut().running.insert(id, ());
        let streamed = stream_tokens(&mut connection, id).await;
        let mut sides = sides.borrow_mut();
        sides.running.remove(&id);
        sides.ended.insert(id, Instant::now());
        sides.match_up(id);
        drop(sides);
        streamed?;
    }
    Ok(())
}

async fn stream_tokens(connection: &mut Connection, id: u64) -> std::io::Result<()> {
    const HEAD: &[u8] =
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    const EVENT: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"}}]}\n\n";
    const END: &str = "data: [DONE]\n\n";
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    connection.write(HEAD).await?;
    let mut state = id;
    for _ in 0..1 + random(&mut state) % TOKENS_MAX {
        tokio::select! {
            () = tokio::time::sleep(TOKEN_PAUSE) => {}
            closed = connection.closed() => return closed,
        }
        connection.write(chunk(EVENT).as_bytes()).await?;
    }
    connection.write((chunk(END) + "0\r\n\r\n").as_bytes()).await
}

async fn client_loop(target: std::net::SocketAddr, client: u64, until: Instant, sides: Shared) {
    let mut state = client;
    let mut kept = None;
    for turn in 0.. {
        if Instant::now() >= until {
            return;
        }
        let id = client << 32 | turn;
        let pieces = (random(&mut state) % 2 == 0).then(|| random(&mut state) % TOKENS_MAX);
        sides.borrow_mut().asked += 1;
        let read = ask(&mut kept, target, id, pieces).await;
        let mut sides = sides.borrow_mut();
        match read {
            Ok(true) => {
                sides.whole += 1;
                sides.ended.remove(&id);
            }
            Ok(false) => {
                kept = None;
                sides.left.insert(id, Instant::now());
                sides.match_up(id);
            }
            Err(_) => {
                kept = None;
                sides.ended.remove(&id);
                sides.broken += 1;
            }
        }
    }
}

/// Whether the stream was read to its end; after `pieces` pieces it is left.
async fn ask(
    kept: &mut Option<Connection>,
    target: std::net::SocketAddr,
    id: u64,
    pieces: Option<u64>,
) -> std::io::Result<bool> {
    if kept.is_none() {
        *kept = Some(Connection::new(TcpStream::connect(target).await?)?);
    }
    let connection = kept.as_mut().expect("connected above");
    let body =
        format!(r#"{{"model":"{MODEL}","messages":[{{"role":"user","content":"hi"}}],"stream":true}}"#);
    let request = format!(
        "POST /v1/chat/completions?id={id} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write(request.as_bytes()).await?;
    let Some(pieces) = pieces else {
        let head = connection.head().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let mut whole = false;
        connection.body(head.length, |part| whole = part.ends_with(b"[DONE]\n\n")).await?;
        return if whole { Ok(true) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) };
    };
    let patience = TOKEN_PAUSE * u32::try_from(pieces).expect("at most TOKENS_MAX");
    let reading = async {
        let head = connection.head().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        debug_assert!(matches!(head.length, Length::Chunked));
        connection.body(head.length, |_| {}).await
    };
    match tokio::time::timeout(patience, reading).await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(false),
    }
}
