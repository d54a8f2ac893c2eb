//! A writer that is held up: everything before it waits, up to the publisher, and nothing is lost.

use super::{Following, Lane, RankCounters, Report, follow};
use crate::config::Endpoint;
use crate::fleet::{Publisher, Source, Trust};
use kvlane_events::stream::{Limits, StreamConfig};
use kvlane_events::wire::EngineKind;
use kvlane_index::hash::Scheme;
use kvlane_index::{BlockSize, IndexConfig, Worker};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

/// Blocks of one message's one event.
const BLOCKS: usize = 256;
/// Messages: 53 MB.
const MESSAGES: usize = 8_000;
/// What may lie between the publisher and the held writer: 4 MiB in the socket's queue, 2^18 blocks in the lane (as wire bytes 7 MB), what is
/// being moved between them, and the kernel's buffers.
const WAITING_MAX: usize = 32 << 20;

struct Silent;

impl Report for Silent {
    fn trust(&self, _: Worker, _: Trust) {}
    fn connection_changed(&self) {}
}

/// One batch with one event, in vLLM's array form.
fn payload() -> Vec<u8> {
    let mut out = vec![0x93, 0xcb];
    out.extend(1_700_000_000.25f64.to_be_bytes());
    out.extend([0x91, 0x95, 0xab]);
    out.extend(b"BlockStored");
    out.extend([0xdc, (BLOCKS >> 8) as u8, BLOCKS as u8]);
    for name in 0..BLOCKS as u64 {
        out.push(0xcf);
        out.extend((name + 1).to_be_bytes());
    }
    out.push(0xc0);
    let tokens = BLOCKS * 16;
    out.extend([0xdc, (tokens >> 8) as u8, tokens as u8]);
    out.extend((0..tokens).map(|i| (i * 7 % 128) as u8));
    out.push(16);
    out.push(0);
    out
}

/// A PUB socket that waits rather than drops; counts what it got rid of.
async fn publish(listener: TcpListener, written: Arc<AtomicUsize>) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut hello = [0; 64];
    (hello[0], hello[9], hello[10]) = (0xff, 0x7f, 3);
    hello[12..16].copy_from_slice(b"NULL");
    stream.write_all(&hello).await.unwrap();
    let ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB";
    stream.write_all(ready).await.unwrap();
    // Greeting, READY and the subscription.
    let mut heard = [0; 64 + 27 + 3];
    stream.read_exact(&mut heard).await.unwrap();
    let payload = payload();
    for seq in 0..MESSAGES as u64 {
        let mut message = vec![1, 0, 1, 8];
        message.extend(seq.to_be_bytes());
        message.push(2);
        message.extend((payload.len() as u64).to_be_bytes());
        message.extend(&payload);
        for part in message.chunks(4096) {
            stream.write_all(part).await.unwrap();
            written.fetch_add(part.len(), Ordering::Relaxed);
        }
    }
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_is_held_up_holds_up_the_publisher_and_loses_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let written = Arc::new(AtomicUsize::new(0));
    let publisher = tokio::spawn(publish(listener, Arc::clone(&written)));

    let block_size = BlockSize::new(16).unwrap();
    let (lane, index) = Lane::open(IndexConfig::new(block_size));
    let counters = Arc::new(RankCounters::default());
    let (_process, process_start) = watch::channel(None);
    let (_relearn, relearn) = watch::channel(0);
    let (_images, images) = mpsc::channel(1);
    let worker = Worker::new(1, 0);

    // The writer looks each event up in the learner.
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let learner = lane.learner.clone();
    let (locked, is_locked) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        learner.with(|_| {
            locked.send(()).unwrap();
            let _ = held.recv();
        });
    });
    is_locked.recv().unwrap();

    let following = tokio::spawn(follow(
        Following {
            worker,
            publisher: Publisher {
                rank: 0,
                events: Endpoint::new("127.0.0.1", port),
                replay: None,
                topic: None,
                source: Source::Operator,
            },
            config: StreamConfig {
                engine: EngineKind::Vllm,
                block_size,
                topic: None,
                replay: false,
                snapshots: false,
                limits: Limits::default(),
            },
            scheme: Scheme::default(),
            lane: lane.clone(),
            counters: Arc::clone(&counters),
            process_start,
            relearn,
            beginnings: None,
            images,
        },
        Silent,
    ));

    // Until the publisher gets nothing more out.
    let (mut last, mut same) = (0, 0);
    while same < 20 {
        tokio::time::sleep(Duration::from_millis(25)).await;
        let now = written.load(Ordering::Relaxed);
        same = if now == last && now > 0 { same + 1 } else { 0 };
        last = now;
    }
    assert!(last < WAITING_MAX, "{last} bytes were taken in while nothing could be applied");
    assert_eq!(counters.read().stored_events, 0, "the writer is held up");
    assert!(lane.waiting() > 1 << 17, "the lane is full: {}", lane.waiting());

    drop(hold);
    holder.join().unwrap();
    let mut patience = 4_000;
    while counters.read().stored_events < MESSAGES as u64 {
        assert!(patience > 0, "{:?}", counters.read());
        patience -= 1;
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let stats = counters.read();
    assert_eq!(
        (stats.stored_events, stats.gaps, stats.drops().count()),
        (MESSAGES as u64, 0, 0),
        "{stats:?}"
    );
    let applied = stats.applied;
    assert_eq!(applied.stored, BLOCKS as u64);
    assert_eq!(applied.stored + applied.copies + applied.duplicates, (MESSAGES * BLOCKS) as u64);
    assert_eq!(index.workers().first().map(|held| held.blocks), Some(BLOCKS as u64));
    following.abort();
    publisher.abort();
}
