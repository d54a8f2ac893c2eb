//! One loop of one contender, so that callgrind counts its instructions and nothing else's.
//!
//! `valgrind --tool=callgrind --toggle-collect='kvlane_bench_measured*' target/release/opponents profile kvlane query`. Counts do not
//! depend on who else uses the machine: the measure for comparing two versions of our own.

use std::time::Duration;

use anyhow::{Context, bail};

use crate::contender::{Event, Setup};
use crate::lane::{self, Lane};
use crate::questions::Plan;
use crate::workload::Family;

/// What to run.
#[derive(clap::Args)]
pub struct Loop {
    /// dynamo, dynamo-radix, chain or kvlane.
    contender: String,
    /// query, fill, remove or steady.
    what: String,
    /// Which of its ways to ask.
    #[arg(long, default_value_t = 0)]
    way: usize,
    /// Workers.
    #[arg(long, default_value_t = 64)]
    workers: usize,
    /// Blocks of a prompt.
    #[arg(long, default_value_t = 512)]
    blocks: usize,
    /// Share of a prompt that is held, in percent.
    #[arg(long, default_value_t = 100)]
    hit: usize,
    /// Blocks of an event.
    #[arg(long, default_value_t = 64)]
    per_event: usize,
    /// (worker, block) pairs.
    #[arg(long, default_value_t = 200_000)]
    pairs: usize,
    /// All workers hold the same.
    #[arg(long)]
    shared: bool,
}

/// Named so that a profiler can be told to look here alone.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn kvlane_bench_measured(work: &mut Work<'_>) {
    match work {
        Work::Ask(lane, way) => {
            lane.ask(*way, Duration::from_nanos(1));
        }
        Work::Apply(lane) => {
            lane.apply_staged(1);
        }
    }
}

/// What is measured.
pub enum Work<'l> {
    /// All posed prompts, twice.
    Ask(&'l dyn Lane, usize),
    /// All staged events.
    Apply(&'l mut dyn Lane),
}

/// Prepares, runs the loop, and says how many operations it had.
pub fn run(plan: &Plan, turn: &Loop) -> anyhow::Result<()> {
    let plan = Plan { only: vec![turn.contender.clone()], ..plan.clone() };
    let mut lanes = plan.lanes(true);
    let lane = lanes.first_mut().context("no such contender")?;
    let family = Family::sized(turn.workers, turn.blocks, turn.pairs, turn.shared);
    let [mut stores, mut again, mut removals] = [const { Vec::<Event>::new() }; 3];
    family.stores(turn.per_event, true, |events| stores.extend(events));
    family.stores(turn.per_event, false, |events| again.extend(events));
    family.removals(turn.per_event, |events| removals.extend(events));
    lane.start(Setup { workers: turn.workers, event_threads: 1 });
    let operations = match turn.what.as_str() {
        "query" => {
            lane.load(&stores);
            lane.settle();
            let prompts = family.prompts(turn.hit, 256);
            lane.pose(&prompts);
            kvlane_bench_measured(&mut Work::Ask(lane.as_ref(), turn.way));
            2 * prompts.len()
        }
        what @ ("fill" | "remove" | "steady") => {
            let phases = [("fill", &stores), ("remove", &removals), ("steady", &again)];
            let last = phases.iter().position(|p| p.0 == what).expect("one of the three");
            for (_, events) in &phases[..last] {
                lane.load(events);
            }
            lane.settle();
            lane.stage(phases[last].1);
            kvlane_bench_measured(&mut Work::Apply(lane.as_mut()));
            lane::blocks(phases[last].1)
        }
        other => bail!("{other}: not one of query, fill, remove, steady"),
    };
    println!("operations {operations}");
    Ok(())
}
