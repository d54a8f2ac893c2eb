//! A publisher's messages as they come, undecoded: for whoever looks at a stream rather than follows it.

use super::socket::{self, Heard, OwnedTask, Replayed};
use super::weighed::Receiver;
use super::zmtp::Message;
use crate::config::Endpoint;
use bytes::Bytes;
use std::collections::VecDeque;

/// Something that a tap heard, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tapped {
    /// The connection is up; from here on messages arrive.
    Connected,
    /// A message, all its frames.
    Message(Vec<Bytes>),
    /// The connection is lost, or could not be made, for this reason. A subscription tries again by itself.
    Lost(String),
}

/// A subscription, or one replay. Closes its connection when dropped.
pub struct Tap {
    source: Source,
    /// Messages that came with the last one.
    waiting: VecDeque<Message>,
}

enum Source {
    Live(Receiver<Heard>, #[expect(dead_code, reason = "ends with the tap")] OwnedTask),
    Replay(Receiver<Replayed>, #[expect(dead_code, reason = "ends with the tap")] OwnedTask),
}

impl Tap {
    /// Subscribes to all topics that begin with `topic`.
    pub fn subscribe(endpoint: &Endpoint, topic: &str) -> Self {
        let (receiver, task) = socket::subscribe(endpoint.clone(), topic.to_owned());
        Self { source: Source::Live(receiver, task), waiting: VecDeque::new() }
    }

    /// Asks once for all batches from `from_seq` on that the engine still has. The last message is the end marker.
    pub fn replay(endpoint: &Endpoint, from_seq: u64) -> Self {
        let (receiver, task) = socket::replay(endpoint.clone(), 0, from_seq);
        Self { source: Source::Replay(receiver, task), waiting: VecDeque::new() }
    }

    /// The next thing heard; `None` after the end of a replay. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Tapped> {
        while self.waiting.is_empty() {
            let messages = match &mut self.source {
                Source::Live(receiver, _) => match receiver.recv().await? {
                    Heard::Connected => return Some(Tapped::Connected),
                    Heard::Messages(messages) => messages,
                    Heard::Lost(error) => return Some(Tapped::Lost(error.to_string())),
                },
                Source::Replay(receiver, _) => receiver.recv().await?.messages?,
            };
            self.waiting.extend(messages);
        }
        self.waiting.pop_front().map(|message| Tapped::Message(message.shared_frames()))
    }
}
