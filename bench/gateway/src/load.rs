//! Closed-loop clients: each sends its next request when the last answer has ended.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use crate::http1::Connection;
use crate::prompts::{Kind, Seeds, Source, Words};

/// An answer that takes longer counts as an error.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// One workload.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cell {
    /// Tokens of a prompt, about.
    pub tokens: usize,
    /// What is new in each.
    pub kind: Kind,
    /// Answers are streams.
    pub streams: bool,
    /// Clients.
    pub clients: usize,
}

/// What the clients saw.
#[derive(Default, Debug)]
pub struct Seen {
    /// ns from the first byte sent to the last byte received.
    pub whole_ns: Vec<u64>,
    /// ns to the first byte of the answer's body.
    pub first_ns: Vec<u64>,
    /// Requests without a whole answer of status 200.
    pub errors: u64,
    /// How long the clients ran.
    pub elapsed: Duration,
}

/// Runs the clients against `target` for about `time`.
pub async fn run(target: SocketAddr, cell: Cell, words: &Arc<Words>, seeds: Seeds, time: Duration) -> Seen {
    let seen = Rc::new(RefCell::new(Seen::default()));
    let local = tokio::task::LocalSet::new();
    let start = Instant::now();
    let deadline = start + time;
    for client in 0..cell.clients {
        let source = Source::new(words, cell, seeds, client as u64);
        local.spawn_local(client_loop(target, source, deadline, Rc::clone(&seen)));
    }
    local.await;
    let mut seen = Rc::try_unwrap(seen).expect("the clients have ended").into_inner();
    seen.elapsed = start.elapsed();
    seen
}

async fn client_loop(target: SocketAddr, mut source: Source, deadline: Instant, seen: Rc<RefCell<Seen>>) {
    let mut connection = None;
    // At least one each, however slow.
    loop {
        let request = source.next();
        let asked = tokio::time::timeout(ANSWER_MAX, ask(&mut connection, target, &request)).await;
        let mut seen = seen.borrow_mut();
        match asked {
            Ok(Ok((first, whole))) => {
                seen.first_ns.push(first.as_nanos() as u64);
                seen.whole_ns.push(whole.as_nanos() as u64);
            }
            Ok(Err(_)) | Err(_) => {
                connection = None;
                seen.errors += 1;
            }
        }
        if Instant::now() >= deadline {
            return;
        }
    }
}

async fn ask(
    kept: &mut Option<Connection>,
    target: SocketAddr,
    request: &[u8],
) -> std::io::Result<(Duration, Duration)> {
    if kept.is_none() {
        *kept = Some(Connection::new(TcpStream::connect(target).await?)?);
    }
    let connection = kept.as_mut().expect("connected above");
    let start = Instant::now();
    connection.write(request).await?;
    let head = connection.head().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let mut first = None;
    let mut tail = [0; 16];
    connection
        .body(head.length, |part| {
            first.get_or_insert_with(|| start.elapsed());
            let keep = part.len().min(tail.len());
            tail.rotate_left(keep);
            let at = tail.len() - keep;
            tail[at..].copy_from_slice(&part[part.len() - keep..]);
        })
        .await?;
    let whole = start.elapsed();
    let complete = tail.ends_with(b"[DONE]\n\n") || tail.ends_with(b"}");
    if !head.first_line.contains(" 200") || !complete {
        return Err(std::io::Error::other(head.first_line));
    }
    Ok((first.unwrap_or(whole), whole))
}
