//! A fence, and what comes back.

use super::*;
use kvlane_index::reference::Oracle;
use kvlane_index::{BlockSize, IndexConfig};

/// Names are the content plus the engine's own number, chained.
fn chain(engine: u64, prompt: &[u64]) -> Vec<StoredBlock> {
    let mut name = engine;
    prompt
        .iter()
        .map(|&content| {
            name = name.wrapping_mul(31).wrapping_add(content);
            StoredBlock { engine: EngineHash(name), block: BlockHash(content) }
        })
        .collect()
}

fn blocks(prompt: &[u64]) -> Arc<[BlockHash]> {
    prompt.iter().copied().map(BlockHash).collect()
}

struct Test {
    rebuild: Rebuild,
    index: Oracle,
    regained: Regained,
}

impl Test {
    fn new() -> Self {
        let config = IndexConfig::new(BlockSize::new(16).unwrap());
        Self { rebuild: Rebuild::new(1_000), index: Oracle::new(&config), regained: Regained::default() }
    }

    fn event(&mut self, worker: Worker, event: KvEvent) {
        let mut out = Vec::new();
        self.regained += self.rebuild.event(worker, event, &mut out);
        for event in &out {
            let _ = self.index.apply(worker, event);
        }
    }

    /// The engine runs a prompt of which it holds the first `hit` blocks.
    fn run(&mut self, worker: Worker, engine: u64, prompt: &[u64], hit: usize) {
        let chain = chain(engine, prompt);
        let parent = hit.checked_sub(1).map(|i| chain[i].engine);
        let blocks = chain[hit..].to_vec();
        self.event(worker, KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent, blocks });
    }

    fn remove(&mut self, worker: Worker, name: EngineHash) {
        let group = Group::default().id;
        self.event(worker, KvEvent::Removed { tier: Tier::Device, group, hashes: vec![name] });
    }

    fn fence(&mut self, worker: Worker, restarted: bool) {
        self.rebuild.fence(worker, restarted);
        let _ = self.index.remove_worker(worker);
    }

    fn device(&self, worker: Worker, prompt: &[u64]) -> u32 {
        self.index.overlap(&blocks(prompt)).get(worker).map_or(0, |o| o.device)
    }
}

const A: Worker = Worker::new(1, 0);
const B: Worker = Worker::new(2, 0);

#[test]
fn the_same_life_is_remembered_across_a_fence() {
    let mut t = Test::new();
    t.run(A, 7, &[1, 2, 3], 0);
    t.fence(A, false);
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 4);
    assert_eq!(t.regained.memory, 3);
    // And what was regained can be removed under its own name.
    t.remove(A, chain(7, &[1, 2])[1].engine);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 1);
}

#[test]
fn a_chain_is_regained_once() {
    let mut t = Test::new();
    t.run(A, 7, &[1, 2], 0);
    t.fence(A, false);
    t.run(A, 7, &[1, 2, 3], 2);
    t.run(A, 7, &[1, 2, 4], 2);
    t.remove(A, chain(7, &[1, 2])[1].engine);
    assert_eq!(t.device(A, &[1, 2, 3]), 1, "one copy, one removal");
}

#[test]
fn another_life_is_believed_only_once_it_is_proven_alike() {
    let mut t = Test::new();
    t.run(A, 7, &[1, 2, 3], 0);
    t.fence(A, true);
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 0);
    assert_eq!(t.regained, Regained::default());
}

#[test]
fn a_rank_that_hashes_alike_knows_the_names() {
    let mut t = Test::new();
    let long: Vec<u64> = (100..120).collect();
    t.run(B, 7, &long, 0);
    t.run(B, 7, &[1, 2, 3], 0);
    t.fence(A, true);
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 0, "not proven yet");
    t.run(A, 7, &long, 0);
    t.run(A, 7, &[1, 2, 3, 5], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 5]), 4);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 4, "the earlier orphan is linked");
    assert_eq!(t.regained.alike, 3);
}

#[test]
fn a_rank_with_another_seed_is_never_believed() {
    let mut t = Test::new();
    let long: Vec<u64> = (100..120).collect();
    t.run(B, 8, &long, 0);
    t.run(B, 8, &[1, 2, 3], 0);
    t.fence(A, true);
    t.run(A, 7, &long, 0);
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 0);
}

#[test]
fn names_that_mean_something_else_elsewhere_prove_nothing() {
    let mut t = Test::new();
    let number = |names: &[u64], prompt: &[u64]| -> Vec<StoredBlock> {
        let pairs = names.iter().zip(prompt);
        pairs.map(|(&n, &p)| StoredBlock { engine: EngineHash(n), block: BlockHash(p) }).collect()
    };
    let store = |t: &mut Test, worker, parent: Option<u64>, blocks: Vec<StoredBlock>| {
        let parent = parent.map(EngineHash);
        t.event(worker, KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent, blocks });
    };
    let names: Vec<u64> = (1..=10).collect();
    store(&mut t, B, None, number(&names, &names));
    store(&mut t, B, None, number(&[50, 51], &[50, 51]));
    t.fence(A, true);
    // Engines that count their blocks: the same numbers, by chance the same content first.
    store(&mut t, A, None, number(&names, &names));
    store(&mut t, A, None, number(&[50], &[99]));
    store(&mut t, A, Some(51), number(&[52], &[52]));
    assert_eq!(t.device(A, &[50, 51, 52]), 0);
}

#[test]
fn a_request_of_the_router_places_its_orphan() {
    let mut t = Test::new();
    t.fence(A, true);
    t.rebuild.request(A, &blocks(&[1, 2, 3, 4]));
    t.run(A, 7, &[1, 2, 3, 4, 5], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4, 5]), 5);
    assert_eq!(t.regained.request, 3);
    // The parent goes, and with it what stood above it under names of ours.
    t.remove(A, chain(7, &[1, 2, 3])[2].engine);
    assert_eq!(t.device(A, &[1, 2, 3, 4, 5]), 0);
}

#[test]
fn requests_that_disagree_place_nothing() {
    let mut t = Test::new();
    t.fence(A, true);
    t.rebuild.request(A, &blocks(&[1, 2, 9]));
    t.rebuild.request(A, &blocks(&[3, 9]));
    t.run(A, 7, &[1, 2, 9], 2);
    assert_eq!(t.device(A, &[1, 2, 9]), 0);
}

#[test]
fn the_middle_of_a_prompt_places_nothing_until_its_end_is_there() {
    let mut t = Test::new();
    t.fence(A, true);
    t.rebuild.request(A, &blocks(&[1, 2, 3, 4, 5]));
    // A long prompt is computed in pieces.
    t.run(A, 7, &[1, 2, 3, 4], 2);
    assert_eq!(t.device(A, &[1, 2, 3, 4, 5]), 0, "3, 4 may stand in another prompt");
    t.run(A, 7, &[1, 2, 3, 4, 5], 4);
    assert_eq!(t.device(A, &[1, 2, 3, 4, 5]), 5);
    assert_eq!(t.regained.request, 2, "what was stored is not stored again");
    t.remove(A, chain(7, &[1, 2, 3, 4])[3].engine);
    assert_eq!(t.device(A, &[1, 2, 3, 4, 5]), 3, "one copy, one removal");
}

#[test]
fn an_orphan_that_was_linked_keeps_its_copies() {
    let mut t = Test::new();
    let long: Vec<u64> = (100..120).collect();
    t.run(B, 7, &[1, 2, 3], 0);
    t.fence(A, true);
    // 3 is an orphan below 2; then 2 finds its place, and 3 with it; then 3 is stored once more.
    t.run(A, 7, &[1, 2, 3], 2);
    t.run(B, 7, &long, 0);
    t.run(A, 7, &long, 0);
    t.run(A, 7, &[1, 2, 9], 2);
    t.run(A, 7, &[1, 2, 3], 2);
    let name = chain(7, &[1, 2, 3])[2].engine;
    t.remove(A, name);
    // Its other copy is held still, and below it something new is stored.
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 4);
    t.remove(A, name);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 2, "two copies, two removals");
}

#[test]
fn orphans_are_not_counted_again_when_their_place_is_remembered() {
    let mut t = Test::new();
    let long: Vec<u64> = (100..120).collect();
    t.run(B, 7, &[1, 2], 0);
    t.fence(A, true);
    t.run(A, 7, &[1, 2, 3], 2);
    t.run(B, 7, &long, 0);
    t.run(A, 7, &long, 0);
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!((t.device(A, &[1, 2, 3, 4]), t.regained.alike), (4, 2));
    t.remove(A, chain(7, &[1, 2, 3])[2].engine);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 2);
}

#[test]
fn an_answer_becomes_a_prediction_while_learning() {
    let mut t = Test::new();
    assert_eq!(t.rebuild.answered(A, 2, 0), None, "nothing is missing");
    t.fence(A, false);
    assert!(t.rebuild.is_learning());
    assert_eq!(t.rebuild.answered(A, 2, 0), Some(Regained { answer: 2, ..Regained::default() }));
    assert_eq!(t.rebuild.answered(A, 2, 2), None);
    t.event(A, KvEvent::Cleared { tier: None });
    assert_eq!(t.rebuild.answered(A, 2, 0), None);
    assert!(!t.rebuild.is_learning());
}

#[test]
fn a_rank_that_is_whole_again_is_not_learnt_any_more() {
    let mut t = Test::new();
    t.fence(A, true);
    t.fence(A, true);
    t.fence(B, false);
    t.rebuild.complete(A);
    assert!(t.rebuild.is_learning());
    t.rebuild.forget(B);
    assert!(!t.rebuild.is_learning());
}

#[test]
fn a_prompt_that_was_pushed_out_places_nothing() {
    let mut t = Test::new();
    t.fence(A, true);
    t.rebuild.request(A, &blocks(&[1, 2, 3, 4]));
    let other: Vec<u64> = (100..40_000).collect();
    t.rebuild.request(A, &blocks(&other));
    t.rebuild.request(A, &blocks(&other));
    t.run(A, 7, &[1, 2, 3, 4], 3);
    assert_eq!(t.device(A, &[1, 2, 3, 4]), 0);
    let learning = t.rebuild.ranks[&A].learning.as_ref().unwrap();
    assert_eq!(learning.requests.len(), (39_900, 39_900), "and leaves nothing behind");
}

#[test]
fn lineage_is_bounded() {
    let mut t = Test::new();
    let source = t.rebuild.lineage.source();
    for i in 0..10_000 {
        t.rebuild.lineage.learn(source, None, &chain(i, &[i]));
    }
    assert!(t.rebuild.lineage.len() <= 2_000);
}
