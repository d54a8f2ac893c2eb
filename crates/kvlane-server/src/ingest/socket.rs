//! The two sockets of a publisher, each read by a task of its own.
//!
//! The subscription is connected again for ever; its connections' beginnings and ends travel in one queue with the messages,
//! because only their order tells whether a batch is from before or after an engine's restart.
//!
//! A replay is one connection for one question. It is read without waiting for the index: an engine's ROUTER drops what a slow
//! reader leaves lying (1,000 messages by default), and a replay has up to 10,000.

use super::weighed::{Receiver, Sender, weighed};
use super::zmtp::{Connection, Message, Role, ZmtpError};
use crate::config::Endpoint;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Bytes of live messages that may wait between socket and stream.
const LIVE_BYTES: u32 = 4 << 20;
/// Bytes of replayed messages that may wait.
const REPLAY_BYTES: u32 = 128 << 20;
/// Messages that came together travel together, up to so many bytes.
const BYTES_AT_ONCE: usize = 128 << 10;
/// First pause before a subscription is connected again; doubles up to the longest.
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
/// The longest such pause. An engine that is back must be exact again within 2 s.
const RECONNECT_LONGEST: Duration = Duration::from_millis(800);

/// What a subscription says, in order.
pub(super) enum Heard {
    Connected,
    /// One or more, as they came together.
    Messages(Vec<Message>),
    Lost(ZmtpError),
}

/// What a replay says.
pub(super) struct Replayed {
    pub(super) attempt: u64,
    /// One or more; `None`: it failed or broke off.
    pub(super) messages: Option<Vec<Message>>,
}

/// A task that ends when this is dropped.
#[derive(Debug)]
pub(super) struct OwnedTask(JoinHandle<()>);

impl OwnedTask {
    pub(super) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task))
    }
}

impl Drop for OwnedTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn weight(messages: &[Message]) -> usize {
    messages.iter().map(Message::weight).sum()
}

/// Subscribes to everything whose topic begins with `topic`.
pub(super) fn subscribe(endpoint: Endpoint, topic: String) -> (Receiver<Heard>, OwnedTask) {
    let (sender, receiver) = weighed(LIVE_BYTES);
    let task = OwnedTask::spawn(async move {
        let mut pause = RECONNECT_FIRST;
        loop {
            let Err(error) = listen(&endpoint, &topic, &sender, &mut pause).await else { return };
            if sender.send(Heard::Lost(error), 1).await.is_err() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_LONGEST);
        }
    });
    (receiver, task)
}

/// One connection, to its end; `Ok` if nobody listens any more.
async fn listen(
    endpoint: &Endpoint,
    topic: &str,
    sender: &Sender<Heard>,
    pause: &mut Duration,
) -> Result<(), ZmtpError> {
    let mut connection = Connection::open(endpoint, Role::Sub).await?;
    connection.subscribe(topic).await?;
    *pause = RECONNECT_FIRST;
    let mut sent = sender.send(Heard::Connected, 1).await;
    while sent.is_ok() {
        let messages = connection.recv_many(BYTES_AT_ONCE).await?;
        let weight = weight(&messages);
        sent = sender.send(Heard::Messages(messages), weight).await;
    }
    Ok(())
}

/// Asks for everything from `from_seq` on.
pub(super) fn replay(endpoint: Endpoint, attempt: u64, from_seq: u64) -> (Receiver<Replayed>, OwnedTask) {
    let (sender, receiver) = weighed(REPLAY_BYTES);
    let task = OwnedTask::spawn(async move {
        let _failed = ask(&endpoint, attempt, from_seq, &sender).await;
        let _ = sender.send(Replayed { attempt, messages: None }, 1).await;
    });
    (receiver, task)
}

async fn ask(
    endpoint: &Endpoint,
    attempt: u64,
    from_seq: u64,
    sender: &Sender<Replayed>,
) -> Result<(), ZmtpError> {
    let mut connection = Connection::open(endpoint, Role::Dealer).await?;
    connection.send(&[b"", &from_seq.to_be_bytes()]).await?;
    loop {
        let messages = connection.recv_many(BYTES_AT_ONCE).await?;
        let is_end =
            messages.last().and_then(|message| message.frames().last()).is_some_and(<[u8]>::is_empty);
        let weight = weight(&messages);
        if sender.send(Replayed { attempt, messages: Some(messages) }, weight).await.is_err() || is_end {
            return Ok(());
        }
    }
}
