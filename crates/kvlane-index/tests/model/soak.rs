//! A whole run of generated operations, and how a failing one is made small.

use super::choice::{Choice, mix};
use super::generator::Generator;
use super::op::Op;
use super::pair::Pair;
use super::regime::Regime;

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Operations generated, queries among them; the probes and checks between them not counted.
    pub operations: u64,
    /// Queries compared, the probes after each operation included, each asked in two ways.
    pub queries: u64,
    /// Queries that some worker held something of.
    pub answered: u64,
    /// Pairs shed for a budget.
    pub shed: u64,
    /// Blocks refused at a bound.
    pub refused: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        let Self { operations, queries, answered, shed, refused } = other;
        self.operations += operations;
        self.queries += queries;
        self.answered += answered;
        self.shed += shed;
        self.refused += refused;
    }
}

/// A difference between index and oracle.
pub struct Failure {
    pub regime: Regime,
    pub prefix_key: u64,
    pub operations: Vec<Op>,
    pub difference: String,
}

/// Generates operations and compares after each, until there are `most` or choices run out.
pub fn run(regime: Regime, choice: Choice<'_>, prefix_key: u64, most: u64) -> Result<Counts, Box<Failure>> {
    let mut generator = Generator::new(regime, choice);
    let mut pair = in_parts(&regime, prefix_key);
    let mut operations: Vec<Op> = Vec::new();
    let mut done = 0;
    let mut result = Ok(());
    while done < most && generator.choice.goes_on() && result.is_ok() {
        let op = generator.next();
        done += 1;
        let asks = matches!(op, Op::Query(_));
        let mut follow = vec![op];
        if !asks {
            follow.push(Op::Query(generator.probe()));
        }
        if done % 500 == 499 {
            follow.push(Op::Check);
        }
        for op in follow {
            if result.is_ok() {
                result = step(&mut pair, &op);
                operations.push(op);
            }
        }
    }
    let ([queries, answered], [shed, refused]) = (pair.queries, pair.given_up);
    match result.and_then(|()| pair.run(&Op::Check)).and_then(|()| pair.drain()) {
        Ok(()) => Ok(Counts { operations: done, queries, answered, shed, refused }),
        Err(difference) => Err(Box::new(Failure { regime, prefix_key, operations, difference })),
    }
}

/// A pair whose replacements go on among other operations, where no budget makes the index forget things meanwhile.
fn in_parts(regime: &Regime, prefix_key: u64) -> Pair {
    let mut pair = Pair::new(regime, prefix_key);
    pair.part_blocks = regime.budget.is_none().then_some(1 + prefix_key as u32 % 8);
    pair
}

/// A panic is a difference too.
fn step(pair: &mut Pair, op: &Op) -> Result<(), String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pair.run(op))).unwrap_or(Err("a panic".into()))
}

/// A run of so many operations, fewer where the oracle is slow; all its choices follow from the seed.
pub fn seeded(regime: Regime, seed: u64, operations: u64) -> Result<Counts, Box<Failure>> {
    run(regime, Choice::Seed(mix(seed)), mix(seed ^ 1), operations.div_ceil(regime.slow))
}

impl Failure {
    fn fails(&self, operations: &[Op]) -> Option<String> {
        let again = || {
            let mut pair = in_parts(&self.regime, self.prefix_key);
            operations.iter().try_for_each(|op| step(&mut pair, op))?;
            pair.run(&Op::Check)?;
            pair.drain()
        };
        again().err()
    }

    /// Leaves out what is not needed to fail: halves, then quarters and so on down to single operations.
    #[must_use]
    pub fn shrink(mut self) -> Self {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let mut chunk = self.operations.len().div_ceil(2);
        while chunk > 0 {
            let mut at = 0;
            while at < self.operations.len() {
                let mut fewer = self.operations.clone();
                fewer.drain(at..(at + chunk).min(fewer.len()));
                match self.fails(&fewer) {
                    Some(difference) => {
                        self.difference = difference;
                        self.operations = fewer;
                    }
                    None => at += chunk,
                }
            }
            chunk /= 2;
        }
        std::panic::set_hook(loud);
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { regime, prefix_key, operations, difference } = self;
        writeln!(
            f,
            "{} operations on a partition with prefix key {prefix_key}, {regime:?}:",
            operations.len()
        )?;
        for op in operations {
            writeln!(f, "{}", op.line())?;
        }
        write!(f, "{difference}")
    }
}
