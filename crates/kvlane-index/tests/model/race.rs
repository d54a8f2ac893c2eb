//! Readers beside the writer, and the oracle's answers at every moment to hold theirs against.
//!
//! The operations of a run are known beforehand, and so are some prompts that they touch. The writer notes the oracle's answer to each
//! prompt after each operation. A reader notes which operations had begun and ended before and after its query; its answer must not
//! exceed what was true after one of them. Where none was under way it must be equal.
//!
//! "After one of them" leaves out the moments inside an operation. So each operation here only adds or only takes (then what is true
//! in its midst is less than before or after it), or first takes and then adds (less than either). An event that names several blocks
//! by names that may be bound elsewhere does neither; it is cut into events of one block each. An operation that makes the index shed
//! has a moment more: what was true before that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use kvlane_index::{BlockHash, DepthGroups, HashedPrompt, KvEvent, Overlaps};

use super::choice::{Choice, mix};
use super::generator::Generator;
use super::op::Op;
use super::pair::{Pair, within};
use super::regime::{Names, Regime};

/// Prompts that readers ask about.
const PROMPTS: usize = 8;
/// Answers that a reader keeps in one run.
const MOST: usize = 100_000;

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Operations of the writer.
    pub operations: u64,
    /// Answers checked.
    pub answers: u64,
    /// Of them, those during which the writer did something.
    pub raced: u64,
    /// Of those, the ones that were true at none of the moments after an operation, but less than was true.
    pub under: u64,
}

impl std::ops::AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        let Self { operations, answers, raced, under } = other;
        self.operations += operations;
        self.answers += answers;
        self.raced += raced;
        self.under += under;
    }
}

/// An answer and the writer's turns (two an operation: begun, ended) before and after it.
struct Answer {
    prompt: usize,
    turns: [u64; 2],
    overlaps: Overlaps,
}

/// Whether an event may take a name from one place and give others to other places.
fn cut(regime: &Regime, op: Op, out: &mut Vec<Op>) {
    match op {
        Op::Event(worker, KvEvent::Stored { tier, group, mut parent, blocks })
            if regime.names != Names::Chained || regime.orphans =>
        {
            for block in blocks {
                out.push(Op::Event(worker, KvEvent::Stored { tier, group, parent, blocks: vec![block] }));
                parent = Some(block.engine);
            }
        }
        // A fresh partition for the same readers is another test's business.
        Op::Restart(_) | Op::Query(_) => {}
        op => out.push(op),
    }
}

/// Runs the operations of a seed beside `readers` threads.
pub fn race(regime: Regime, seed: u64, operations: u64, readers: u64) -> Result<Seen, String> {
    let mut generator = Generator::new(regime, Choice::Seed(mix(seed)));
    let (mut ops, mut paths) = (Vec::new(), Vec::new());
    for _ in 0..operations.div_ceil(regime.slow) {
        let op = generator.next();
        paths.push(match &op {
            Op::Query(path) => path.clone(),
            _ => generator.probe(),
        });
        cut(&regime, op, &mut ops);
    }
    let mut choice = Choice::Seed(mix(seed ^ 2));
    let prompts: Vec<Vec<BlockHash>> =
        (0..PROMPTS).map(|_| choice.pick(&paths).cloned().unwrap_or_default()).collect();

    let mut pair = Pair::new(&regime, mix(seed ^ 1));
    let asked = |pair: &Pair| prompts.iter().map(|p| pair.oracle.overlap(p)).collect::<Vec<_>>();
    let mut history = vec![[asked(&pair), asked(&pair)]];
    let (turn, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let index = pair.index.clone();
    let read = |reader: u64| {
        let mut choice = Choice::Seed(mix(seed ^ (reader + 10)));
        let (mut hashed, mut groups) = (HashedPrompt::default(), DepthGroups::default());
        let mut answers = Vec::<Answer>::new();
        while !done.load(SeqCst) && answers.len() < MOST {
            let prompt = choice.below(PROMPTS as u64) as usize;
            let (prehashed, grouped) = (choice.one_in(3), choice.one_in(2));
            if prehashed {
                index.hash_prompt(&prompts[prompt], &mut hashed);
            }
            let mut overlaps = Overlaps::default();
            let before = turn.load(SeqCst);
            if prehashed {
                index.overlap_hashed(&hashed, &mut overlaps);
            } else if grouped {
                index.depth_groups(&prompts[prompt], &mut groups);
            } else {
                index.overlap(&prompts[prompt], &mut overlaps);
            }
            let turns = [before, turn.load(SeqCst)];
            if grouped && !prehashed {
                groups.list(&mut overlaps);
            }
            answers.push(Answer { prompt, turns, overlaps });
        }
        answers
    };
    let mut written = Ok(());
    let answers: Vec<Vec<Answer>> = std::thread::scope(|scope| {
        let read = &read;
        let threads: Vec<_> = (0..readers).map(|reader| scope.spawn(move || read(reader))).collect();
        for op in &ops {
            turn.fetch_add(1, SeqCst);
            let mut unshed = Vec::new();
            written = pair.run_seeing(op, |pair| unshed = asked(pair));
            turn.fetch_add(1, SeqCst);
            if written.is_err() {
                break;
            }
            history.push([unshed, asked(&pair)]);
        }
        done.store(true, SeqCst);
        threads.into_iter().map(|thread| thread.join().expect("a reader panicked")).collect()
    });
    written?;
    pair.run(&Op::Check)?;
    let mut seen = Seen { operations: ops.len() as u64, ..Seen::default() };
    for Answer { prompt, turns: [before, after], overlaps } in answers.into_iter().flatten() {
        seen.answers += 1;
        // Even: so many operations had ended and none had begun. Odd: one more has begun, which may have been seen.
        let (from, to) = (before as usize / 2, after.div_ceil(2) as usize);
        // Of the operation that had ended before the query, only what is true after all of it.
        let moments = history[from..=to.min(history.len() - 1)]
            .iter()
            .flatten()
            .skip(1)
            .map(|answers| &answers[prompt]);
        seen.raced += u64::from(from != to);
        if moments.clone().any(|truth| overlaps == *truth) {
            continue;
        }
        seen.under += 1;
        if from == to || !moments.clone().any(|truth| within(&overlaps, truth)) {
            let moments: Vec<_> = moments.collect();
            return Err(format!(
                "{prompt:?} = {:?}\nasked during operations {from}..{to}\n  {:?}\nanswer {overlaps:?}\ntruth {moments:?}",
                prompts[prompt],
                &ops[from..to],
            ));
        }
    }
    Ok(seen)
}
