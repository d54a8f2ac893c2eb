//! Readers beside a writer: an answer may be late or too small, never too large.
//!
//! Each test drives the index through states whose possible answers are known, so that a reader that mixed two moments would
//! say something that was never true. `KVLANE_TURNS` sets the turns of the writer (default 20,000).

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test: threads, set by the environment"
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use kvlane_index::{
    BlockHash, BlockSize, EngineHash, Group, GroupId, Index, IndexConfig, IndexWriter, KvEvent, Overlaps,
    StoredBlock, Tier, Worker,
};

const READERS: usize = 3;

fn turns() -> u64 {
    std::env::var("KVLANE_TURNS").ok().and_then(|v| v.parse().ok()).unwrap_or(20_000)
}

fn stored(parent: Option<u64>, blocks: &[(u64, u64)]) -> KvEvent {
    KvEvent::Stored {
        tier: Tier::Device,
        group: Group::default(),
        parent: parent.map(EngineHash),
        blocks: blocks
            .iter()
            .map(|&(e, b)| StoredBlock { engine: EngineHash(e), block: BlockHash(b) })
            .collect(),
    }
}

fn removed(hashes: &[u64]) -> KvEvent {
    let hashes = hashes.iter().copied().map(EngineHash).collect();
    KvEvent::Removed { tier: Tier::Device, group: GroupId(0), hashes }
}

/// Runs the writer's turns beside readers that check every answer to `prompt`; how many answers said something.
fn race(
    prompt: &[u64],
    write: impl Fn(&mut IndexWriter, &Index, u64) + Sync,
    check: impl Fn(&Overlaps) + Sync,
) -> u64 {
    let (mut writer, index) = kvlane_index::partition(IndexConfig::new(BlockSize::new(16).unwrap()));
    let prompt: Vec<BlockHash> = prompt.iter().copied().map(BlockHash).collect();
    let (done, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let mut overlaps = Overlaps::default();
                while !done.load(Relaxed) {
                    index.overlap(&prompt, &mut overlaps);
                    check(&overlaps);
                    answers.fetch_add(u64::from(!overlaps.ranks.is_empty()), Relaxed);
                }
            });
        }
        for turn in 0..turns() {
            write(&mut writer, &index, turn);
        }
        done.store(true, Relaxed);
    });
    answers.into_inner()
}

#[test]
fn two_runs_are_never_added_up_across_moments() {
    let (subject, other) = (Worker::new(1, 0), Worker::new(2, 0));
    let answers = race(
        &[1, 2, 3, 4],
        |writer, _, turn| {
            if turn == 0 {
                // Another worker keeps the places alive, as two runs: its second chain leaves after block 2.
                let _ = writer.apply(other, &stored(None, &[(11, 1), (12, 2), (13, 3), (14, 4)]));
                let _ = writer.apply(other, &stored(Some(12), &[(15, 9)]));
                let _ = writer.apply(subject, &stored(None, &[(21, 1), (22, 2)]));
            }
            // The subject holds the first two blocks or the last two, and never all four.
            let _ = writer.apply(subject, &stored(Some(22), &[(23, 3)]));
            let _ = writer.apply(subject, &removed(&[21]));
            let _ = writer.apply(subject, &stored(Some(23), &[(24, 4)]));
            let _ = writer.apply(subject, &removed(&[24]));
            let _ = writer.apply(subject, &stored(None, &[(21, 1)]));
            let _ = writer.apply(subject, &removed(&[23]));
        },
        |overlaps| {
            let device = overlaps.get(subject).map_or(0, |o| o.device);
            assert!(device <= 3, "the subject never held more than 3 blocks from the root: {device}");
            if let Some(o) = overlaps.get(other) {
                assert!(o.device <= 4 && o.predicted == o.device, "{o:?}");
            }
        },
    );
    assert!(answers > 0);
}

#[test]
fn a_place_that_is_used_again_is_not_mistaken() {
    // Chains are stored and removed whole, so that runs, pages and lists are reused at once for other prompts.
    let chain = |turn: u64, at: u64| (1000 * (turn % 7) + at, 100 * (turn % 7) + at);
    let answers = race(
        &(0..40).map(|at| 300 + at).collect::<Vec<u64>>(),
        |writer, _, turn| {
            let worker = Worker::new(turn % 7, 0);
            let len = 1 + turn * 13 % 40;
            let blocks: Vec<(u64, u64)> = (0..len).map(|at| chain(turn, at)).collect();
            let _ = writer.apply(worker, &stored(None, &blocks));
            let before = Worker::new((turn + 4) % 7, 0);
            let _ = writer.apply(
                before,
                &KvEvent::Cleared { tier: if turn % 3 == 0 { None } else { Some(Tier::Device) } },
            );
        },
        |overlaps| {
            for overlap in &overlaps.ranks {
                assert_eq!(overlap.worker, Worker::new(3, 0), "only worker 3 ever held this prompt");
                assert!(overlap.device <= 40);
            }
        },
    );
    assert!(answers > 0);
}

#[test]
fn workers_that_come_and_go_are_not_mistaken_for_one_another() {
    // Even workers hold prompt 1, odd ones prompt 2, and they take one another's slots.
    let answers = race(
        &[1, 1, 1],
        |writer, _, turn| {
            let worker = Worker::new(turn, 0);
            let content = 1 + turn % 2;
            let blocks: Vec<(u64, u64)> = (0..3).map(|at| (10 * content + at, content)).collect();
            let _ = writer.apply(worker, &stored(None, &blocks));
            if turn >= 3 {
                let _ = writer.remove_worker(Worker::new(turn - 3, 0));
            }
        },
        |overlaps| {
            for overlap in &overlaps.ranks {
                assert_eq!(overlap.worker.instance.0 % 2, 0, "{overlap:?}");
                assert!(overlap.device <= 3);
            }
        },
    );
    assert!(answers > 0);
}

#[test]
fn predictions_come_and_go_beside_readers() {
    let (subject, other) = (Worker::new(1, 0), Worker::new(2, 0));
    let prompt: Vec<BlockHash> = (1..=6).map(BlockHash).collect();
    let answers = race(
        &[1, 2, 3, 4, 5, 6],
        |writer, index, turn| {
            let _ = writer.apply(other, &stored(None, &[(11, 1), (12, 2), (13, 3)]));
            index.predict(subject, &prompt[..3 + turn as usize % 3], turn);
            index.predict(other, &prompt[..5], turn + 1);
            index.expire(turn);
            let _ = writer.apply(other, &removed(&[13, 12, 11]));
        },
        |overlaps| {
            if let Some(o) = overlaps.get(subject) {
                assert!(o.device == 0 && o.predicted <= 5, "{o:?}");
            }
            if let Some(o) = overlaps.get(other) {
                assert!(o.device <= 3 && o.predicted <= 5, "{o:?}");
            }
        },
    );
    assert!(answers > 0);
}
