//! A rank's event sockets: PUB for the live stream, ROUTER for replays.
//!
//! The sequence number starts at 0 in each life and grows by one for each batch; the last batches are kept for replay.
//! Both sockets are the `zeromq` crate's. What was found wanting in 0.7: its PUB has no linger (messages queued when the
//! socket is dropped are lost, which for a mock that dies is what should happen), and it accepts a subscription only after the
//! subscriber's first frame arrives, so subscribers see the slow-joiner gap that they see with libzmq.

use super::faults::{Dice, Fate, Faults};
use anyhow::Context;
use bytes::Bytes;
use kvlane_engine::CacheEvent;
use kvlane_engine::wire::{self, Form, ReplayForm};
use kvlane_index::BlockSize;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Batches between the engine and its publisher; a full queue makes the engine wait, as in vLLM (`max_queue_size`).
const QUEUE_BATCHES: usize = 100_000;

/// What a publisher is.
#[derive(Clone, Debug)]
pub(super) struct PublisherConfig {
    pub(super) address: IpAddr,
    /// 0 = a free one.
    pub(super) port: u16,
    /// 0 = a free one.
    pub(super) replay_port: u16,
    pub(super) topic: String,
    pub(super) rank: u32,
    pub(super) form: Form,
    pub(super) block_size: BlockSize,
    /// Batches kept for replay; at least 1.
    pub(super) buffer_steps: usize,
}

/// Batches kept for replay: (sequence number, payload), in order.
type Kept = Arc<Mutex<VecDeque<(u64, Bytes)>>>;

/// A running publisher. Dropping it closes its sockets.
pub(super) struct Publisher {
    batches: mpsc::Sender<Vec<CacheEvent>>,
    /// `tcp://host:port` of the PUB and of the ROUTER socket.
    pub(super) endpoint: String,
    pub(super) replay_endpoint: String,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Publisher {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Publisher {
    /// Binds both sockets and starts to serve them.
    pub(super) async fn start(
        config: PublisherConfig,
        faults: watch::Receiver<Faults>,
    ) -> anyhow::Result<Self> {
        let mut publisher = PubSocket::new();
        let endpoint = bind(&mut publisher, config.address, config.port).await.context("event socket")?;
        let mut router = RouterSocket::new();
        let replay_endpoint =
            bind(&mut router, config.address, config.replay_port).await.context("replay socket")?;
        let kept = Kept::default();
        let (batches, receiver) = mpsc::channel(QUEUE_BATCHES);
        let topic = config.topic.clone();
        let tasks = [
            tokio::spawn(publish(config, publisher, receiver, Arc::clone(&kept), faults)),
            tokio::spawn(replay(router, topic, kept)),
        ];
        Ok(Self { batches, endpoint, replay_endpoint, tasks })
    }

    /// Where a rank hands over the events of each step.
    pub(super) fn batches(&self) -> mpsc::Sender<Vec<CacheEvent>> {
        self.batches.clone()
    }
}

async fn bind(socket: &mut impl Socket, address: IpAddr, port: u16) -> anyhow::Result<String> {
    let asked = SocketAddr::new(address, port);
    let bound = socket
        .bind(&format!("tcp://{asked}"))
        .await
        .with_context(|| format!("cannot bind tcp://{asked}: is the port taken?"))?;
    Ok(bound.to_string())
}

async fn publish(
    config: PublisherConfig,
    mut socket: PubSocket,
    mut batches: mpsc::Receiver<Vec<CacheEvent>>,
    kept: Kept,
    faults: watch::Receiver<Faults>,
) {
    let mut dice = Dice::new(faults.borrow().seed, u64::from(config.rank));
    let mut overtaken: Option<ZmqMessage> = None;
    let mut sequence = 0u64;
    while let Some(events) = batches.recv().await {
        let mut payload = Vec::new();
        let rank = Some(config.rank);
        wire::write_batch(config.form, unix_seconds(), &events, rank, config.block_size, &mut payload);
        let payload = Bytes::from(payload);
        {
            let mut kept = kept.lock().expect("no holder of this lock panics");
            if kept.len() >= config.buffer_steps {
                kept.pop_front();
            }
            kept.push_back((sequence, payload.clone()));
        }
        let message = message(vec![
            Bytes::from(config.topic.clone().into_bytes()),
            Bytes::copy_from_slice(&sequence.to_be_bytes()),
            payload,
        ]);
        sequence += 1;
        let (fate, delay_ms) = {
            let faults = faults.borrow();
            (faults.fate(&mut dice), faults.delay_ms)
        };
        if delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        }
        let sent = match fate {
            Fate::Dropped => Ok(()),
            Fate::Published => socket.send(message).await,
            Fate::Doubled => match socket.send(message.clone()).await {
                Ok(()) => socket.send(message).await,
                Err(error) => Err(error),
            },
            Fate::Overtaken if overtaken.is_none() => {
                overtaken = Some(message);
                continue;
            }
            Fate::Overtaken => socket.send(message).await,
        };
        let sent = match (sent, overtaken.take()) {
            (Ok(()), Some(earlier)) => socket.send(earlier).await,
            (sent, _) => sent,
        };
        if let Err(error) = sent {
            tracing::warn!(%error, rank = config.rank, "an event message could not be sent");
        }
    }
}

/// Answers `["", first sequence]` with every kept batch from there on and an end marker; anything else with nothing.
async fn replay(mut router: RouterSocket, topic: String, kept: Kept) {
    while let Ok(request) = router.recv().await {
        let frames = request.into_vec();
        let [peer, empty, from] = frames.as_slice() else { continue };
        if !empty.is_empty() || from.len() > 8 {
            tracing::debug!("a replay request without its empty frame, or with a long sequence number");
            continue;
        }
        let from = from.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        let wanted: Vec<(u64, Bytes)> = {
            let kept = kept.lock().expect("no holder of this lock panics");
            kept.iter().filter(|batch| batch.0 >= from).cloned().collect()
        };
        let replies = wanted
            .into_iter()
            .map(|(sequence, payload)| {
                let head = wire::replay_frames(ReplayForm::WithTopic, &topic, sequence, Vec::new());
                let mut frames: Vec<Bytes> = head.into_iter().map(Bytes::from).collect();
                if let Some(last) = frames.last_mut() {
                    *last = payload;
                }
                frames
            })
            .chain([wire::replay_end_frames(ReplayForm::WithTopic).into_iter().map(Bytes::from).collect()]);
        for frames in replies {
            let frames = std::iter::once(peer.clone()).chain(frames).collect();
            if let Err(error) = router.send(message(frames)).await {
                tracing::debug!(%error, "a replay was broken off: its asker is gone");
                break;
            }
        }
    }
}

fn message(frames: Vec<Bytes>) -> ZmqMessage {
    ZmqMessage::try_from(frames).expect("a message has frames")
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
