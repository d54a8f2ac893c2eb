//! Kinds of runs: what engines do, each habit alone and all of them together.

/// How engines name a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Names {
    /// By its prefix, alike in all workers.
    Chained,
    /// By its prefix and a secret of the worker (vLLM before 0.29).
    PerWorker,
    /// By its prefix and one of three secrets: a worker may have several names for one block.
    Several,
    /// By its content and a number: the same name in many places.
    Unchained,
    /// By anything from a few numbers, the largest and smallest included: names of different workers and prompts collide.
    Colliding,
}

/// What kinds of operations a run generates.
#[derive(Clone, Copy, Debug)]
pub struct Regime {
    pub name: &'static str,
    pub workers: u64,
    pub ranks: u32,
    /// Different block hashes; few make prompts collide.
    pub alphabet: u64,
    /// Longest chain of one event.
    pub chain: u64,
    /// Blocks of the longest prompt.
    pub depth: usize,
    pub names: Names,
    pub tiers: bool,
    pub groups: bool,
    pub predictions: bool,
    pub orphans: bool,
    /// Orphans kept for each rank; the index refuses more.
    pub max_orphans: u32,
    /// How long they wait; an `expire` goes 50 at most.
    pub max_orphan_age_ms: u64,
    /// Only leaves are removed.
    pub leaf_first: bool,
    pub copies: bool,
    /// One in so many operations clears or removes something large.
    pub clear_every: u64,
    /// Names change with each life of a worker.
    pub restarts: bool,
    /// Ranks are replaced by what was dumped earlier, whole partitions go through a snapshot.
    pub snapshots: bool,
    /// How much slower the oracle is here: a run has that many times fewer operations.
    pub slow: u64,
    /// Bytes above those of an empty index at which it sheds.
    pub budget: Option<u64>,
}

pub const PLAIN: Regime = Regime {
    name: "plain",
    workers: 4,
    ranks: 1,
    alphabet: 3,
    chain: 6,
    depth: 100,
    names: Names::Chained,
    tiers: false,
    groups: false,
    predictions: false,
    orphans: false,
    max_orphans: 1 << 16,
    max_orphan_age_ms: 300,
    leaf_first: false,
    copies: false,
    clear_every: 100,
    restarts: false,
    snapshots: false,
    slow: 1,
    budget: None,
};

const EVERYTHING: Regime = Regime {
    name: "everything",
    ranks: 2,
    chain: 20,
    names: Names::Several,
    tiers: true,
    groups: true,
    predictions: true,
    orphans: true,
    copies: true,
    restarts: true,
    snapshots: true,
    ..PLAIN
};

pub const REGIMES: [Regime; 26] = [
    Regime { name: "leaf first", leaf_first: true, ..PLAIN },
    PLAIN,
    Regime { name: "one content", alphabet: 1, chain: 12, ..PLAIN },
    Regime { name: "per-worker names", names: Names::PerWorker, ..PLAIN },
    Regime { name: "several names", names: Names::Several, ..PLAIN },
    Regime { name: "unchained names", names: Names::Unchained, ..PLAIN },
    Regime { name: "colliding names", names: Names::Colliding, copies: true, orphans: true, ..PLAIN },
    Regime { name: "copies", copies: true, ..PLAIN },
    Regime { name: "long chains", slow: 20, chain: 60, alphabet: 2, workers: 6, depth: 150, ..PLAIN },
    Regime { name: "very long chains", slow: 100, chain: 500, alphabet: 1, workers: 3, depth: 1200, ..PLAIN },
    Regime { name: "many workers", slow: 5, workers: 200, alphabet: 2, depth: 20, ..PLAIN },
    Regime {
        name: "few of many workers",
        slow: 5,
        workers: 900,
        alphabet: 12,
        depth: 12,
        tiers: true,
        ..PLAIN
    },
    Regime { name: "predictions", predictions: true, ..PLAIN },
    Regime {
        name: "predictions of many",
        slow: 5,
        predictions: true,
        workers: 150,
        ranks: 2,
        depth: 20,
        ..PLAIN
    },
    Regime { name: "tiers", tiers: true, ranks: 2, ..PLAIN },
    Regime { name: "groups", groups: true, predictions: true, ..PLAIN },
    Regime { name: "groups in tiers", groups: true, tiers: true, chain: 20, names: Names::Several, ..PLAIN },
    Regime { name: "orphans", orphans: true, names: Names::PerWorker, ..PLAIN },
    Regime {
        name: "orphans of several names",
        orphans: true,
        names: Names::Several,
        copies: true,
        tiers: true,
        ..PLAIN
    },
    Regime { name: "orphans that age", orphans: true, predictions: true, max_orphan_age_ms: 120, ..PLAIN },
    Regime {
        name: "few orphans allowed",
        orphans: true,
        max_orphans: 6,
        names: Names::Several,
        tiers: true,
        ..PLAIN
    },
    Regime {
        name: "restarts",
        restarts: true,
        clear_every: 15,
        names: Names::PerWorker,
        tiers: true,
        ranks: 2,
        ..PLAIN
    },
    Regime {
        name: "snapshots",
        snapshots: true,
        names: Names::Several,
        tiers: true,
        groups: true,
        copies: true,
        orphans: true,
        ..PLAIN
    },
    Regime {
        name: "budget",
        budget: Some(60_000),
        alphabet: 20,
        chain: 30,
        tiers: true,
        names: Names::Several,
        copies: true,
        clear_every: 4000,
        ..PLAIN
    },
    Regime {
        name: "budget and predictions",
        budget: Some(60_000),
        alphabet: 20,
        chain: 30,
        tiers: true,
        groups: true,
        predictions: true,
        ranks: 2,
        clear_every: 4000,
        ..PLAIN
    },
    EVERYTHING,
];
