//! The production structure against the oracle, on generated operations.
//!
//! CI runs a bounded number. `KVLANE_OPS` sets the operations for each regime and seed (default 500), `KVLANE_SEEDS` the number of seeds
//! (default 4), `KVLANE_SEED` the first one, `KVLANE_REGIME` a part of the name of the regimes to run. Millions: the example
//! `soak`. A failure prints its regime and seed, and the fewest operations found that still fail, as lines for
//! `kvlane index run FILE --check`.

#![expect(clippy::disallowed_methods, clippy::panic, reason = "a test, set by the environment")]

mod model;

use kvlane_index::{
    BlockHash, BlockSize, EngineHash, Group, GroupId, GroupKind, IndexConfig, KvEvent, Overlaps, StoredBlock,
    Tier, Worker, partition,
};
use model::choice::Choice;
use model::op::Op;
use model::pair::Pair;
use model::regime::{PLAIN, REGIMES, Regime};
use model::soak::{Counts, run, seeded};

fn config() -> IndexConfig {
    IndexConfig::new(BlockSize::new(16).expect("16 is not 0"))
}

fn check(regimes: impl Iterator<Item = Regime>) {
    let number = |name, or| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let (operations, seeds) = (number("KVLANE_OPS", 500), number("KVLANE_SEEDS", 4));
    let first: u64 = number("KVLANE_SEED", 1);
    let only = std::env::var("KVLANE_REGIME").unwrap_or_default();
    for regime in regimes.filter(|r| r.name.contains(&only)) {
        let mut counts = Counts::default();
        for seed in first..first + seeds {
            match seeded(regime, seed, operations) {
                Ok(more) => counts += more,
                Err(failure) => {
                    panic!(
                        "regime {:?}, seed {seed}, {operations} operations: {}",
                        regime.name,
                        failure.shrink()
                    )
                }
            }
        }
        let Counts { queries, answered, shed, refused, .. } = counts;
        assert!(answered * 3 > queries, "regime {:?} asks too much about nothing: {counts:?}", regime.name);
        assert!(operations < 500 || regime.budget.is_none() || shed > 10, "nothing was shed: {counts:?}");
        assert!(
            operations < 500 || regime.max_orphans > 100 || refused > 3,
            "nothing was refused: {counts:?}"
        );
    }
}

// Four tests, so that they run beside one another.

#[test]
fn the_index_equals_the_oracle_where_names_differ() {
    check(REGIMES.into_iter().filter(|r| !r.tiers && !r.groups && !r.predictions));
}

#[test]
fn the_index_equals_the_oracle_with_predictions() {
    check(REGIMES.into_iter().filter(|r| r.predictions && !r.snapshots && r.budget.is_none()));
}

#[test]
fn the_index_equals_the_oracle_over_tiers_and_groups() {
    check(REGIMES.into_iter().filter(|r| (r.tiers || r.groups) && !r.predictions && r.budget.is_none()));
}

#[test]
fn what_is_left_by_a_budget_and_by_snapshots_equals_the_oracle() {
    check(REGIMES.into_iter().filter(|r| r.predictions && r.snapshots || r.budget.is_some()));
}

/// The fuzzer's way in.
#[test]
fn choices_from_bytes_end() {
    let bytes: Vec<u8> = (0..4000u32).map(|i| (i * i / 7) as u8).collect();
    for regime in REGIMES {
        match run(regime, Choice::Bytes(&bytes), 1, 200 / regime.slow) {
            Ok(counts) => assert!(counts.operations > 1, "{counts:?}"),
            Err(failure) => panic!("{}", failure.shrink()),
        }
    }
}

/// A failing run becomes a short one: here the "index" is right, and the trail is made wrong.
#[test]
fn a_failing_run_is_made_small() {
    let worker = Worker::new(1, 0);
    let stored = |engine, block| {
        let (tier, group) = (Tier::Device, Group::default());
        let blocks = vec![StoredBlock { engine: EngineHash(engine), block: BlockHash(block) }];
        Op::Event(worker, KvEvent::Stored { tier, group, parent: None, blocks })
    };
    let mut pair = Pair::new(&PLAIN, 1);
    assert_eq!(pair.run(&stored(1, 1)), Ok(()));
    // An operation that only the index gets.
    let event = KvEvent::Cleared { tier: None };
    let _ = pair.writer.apply(worker, &event);
    assert!(pair.run(&Op::Query(vec![BlockHash(1)])).is_err(), "the difference is seen by a query");
    assert!(pair.run(&Op::Check).is_err(), "and by the figures");
    assert_eq!(
        stored(1, 2).line(),
        r#"{"op":"stored","worker":1,"rank":0,"tier":"device","group":0,"parent":null,"blocks":[[1,2]]}"#
    );
}

/// A window of one token asks for nothing before the next one; still nothing is hit where nothing is held. (The oracle once counted the
/// whole prompt.)
#[test]
fn a_window_without_width_hits_only_what_is_held() {
    let mut pair = Pair::new(&PLAIN, 1);
    let group = Group { id: GroupId(1), kind: GroupKind::Sliding { window_tokens: 1 } };
    let (worker, tier) = (Worker::new(1, 0), Tier::Device);
    let blocks = (1..4).map(|i| StoredBlock { engine: EngineHash(i), block: BlockHash(i) }).collect();
    let stored = KvEvent::Stored { tier, group, parent: None, blocks };
    assert_eq!(pair.run(&Op::Event(worker, stored)), Ok(()));
    for prompt in [&[1, 2, 3, 4][..], &[9, 9], &[]] {
        let prompt: Vec<BlockHash> = prompt.iter().copied().map(BlockHash).collect();
        assert_eq!(pair.run(&Op::Query(prompt.clone())), Ok(()));
        let held = if prompt.len() == 4 { 3 } else { 0 };
        assert_eq!(pair.oracle.overlap(&prompt).get(worker).map_or(0, |o| o.device), held);
    }
}

/// Over the budget, a prediction goes before anything that an engine said.
#[test]
fn predictions_are_shed_first() {
    let mut config = config();
    config.budget_bytes = Some(partition(config).1.stats().bytes + 500_000);
    let (mut writer, index) = partition(config);
    let mut shed = 0;
    for i in 0..3_000u64 {
        let blocks: Vec<_> = (0..20).map(|k| BlockHash(1000 * i + k)).collect();
        index.predict(Worker::new(1, 0), &blocks, 1_000 + i);
        if i < 60 {
            let stored = blocks.iter().map(|&block| StoredBlock { engine: EngineHash(block.0 + 7), block });
            let (tier, group) = (Tier::Device, Group::default());
            let event = KvEvent::Stored { tier, group, parent: None, blocks: stored.collect() };
            shed += writer.apply(Worker::new(2, 0), &event).shed;
        }
    }
    let stats = index.stats();
    assert!(stats.predicted > 0 && stats.predicted < 60_000, "{stats:?}");
    assert_eq!((stats.pairs, shed), (60 * 20, 0), "{stats:?}");
}

/// A prompt longer than a run may be (2^20 blocks) is several runs, and counts as one.
#[test]
fn a_prompt_longer_than_a_run() {
    let (mut writer, index) = partition(config());
    let worker = Worker::new(1, 0);
    let length = (1u64 << 20) + 5000;
    let prompt: Vec<BlockHash> = (0..length).map(BlockHash).collect();
    let (tier, group) = (Tier::Device, Group::default());
    for from in (0..length).step_by(1 << 16) {
        let blocks = (from..length.min(from + (1 << 16)))
            .map(|i| StoredBlock { engine: EngineHash(i + 1), block: BlockHash(i) })
            .collect();
        let parent = (from > 0).then_some(EngineHash(from));
        let _ = writer.apply(worker, &KvEvent::Stored { tier, group, parent, blocks });
    }
    let mut overlaps = Overlaps::default();
    let mut device = |prompt: &[BlockHash]| {
        index.overlap(prompt, &mut overlaps);
        overlaps.get(worker).map_or(0, |o| u64::from(o.device))
    };
    assert_eq!(device(&prompt), length);
    let hashes = vec![EngineHash((1 << 20) + 11)];
    let _ = writer.apply(worker, &KvEvent::Removed { tier, group: group.id, hashes });
    assert_eq!(device(&prompt), (1 << 20) + 10);
    let _ = writer.remove_worker(worker);
    assert_eq!(index.stats().places, 0);
}
