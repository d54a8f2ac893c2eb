//! How many bytes does a (worker, block) pair take?
//!
//! Each figure comes from a process of its own, which does nothing else: allocators keep what others freed. Not a matter of rounds:
//! the same process gives the same bytes.

use std::io::Write;

use anyhow::{Context, ensure};

use crate::clock;
use crate::contender::{Event, Setup};
use crate::questions::Plan;
use crate::record::Sheet;
use crate::spread::Spread;
use crate::workload::Family;

const WORKERS: usize = 64;
const PROMPT_BLOCKS: usize = 512;
/// Rounds of removing every conversation and storing others, in the churn cell.
const CHURN_ROUNDS: usize = 10;

/// (kind, pairs, blocks an event).
type Cell = (&'static str, usize, usize);

/// Runs each cell and contender in a child process.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "memory", 1, plan.quick)?;
    let full: &[Cell] = &[
        ("distinct", 1_000_000, 64),
        ("distinct", 1_500_000, 64),
        ("distinct", 10_000_000, 64),
        ("distinct", 1_000_000, 1),
        ("shared", 1_000_000, 64),
        ("shared", 10_000_000, 64),
        ("churned", 1_000_000, 64),
    ];
    let quick: &[Cell] = &[("distinct", 200_000, 64), ("shared", 200_000, 64)];
    for (kind, pairs, per_event) in if plan.quick { quick } else { full } {
        for lane in plan.lanes(true) {
            let name = lane.ways()[0];
            let output = std::process::Command::new(std::env::current_exe()?)
                .args(["memory-of", name, kind, &pairs.to_string(), &per_event.to_string()])
                .output()
                .context("could not start itself")?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout)?;
            let mut figures = text.split_whitespace().map(str::parse::<f64>);
            let mut figure = || figures.next().context("two figures")?.context("a number");
            let (heap, resident) = (figure()?, figure()?);
            sheet.row(
                &[("pairs", pairs), ("kind", kind), ("per_event", per_event)],
                name,
                &[("heap_bytes", Spread::of(vec![heap])), ("resident_bytes", Spread::of(vec![resident]))],
                None,
            );
        }
    }
    sheet.end()
}

/// The child: prints heap and resident bytes a pair.
pub fn of(plan: &Plan, kind: &str, pairs: usize, per_event: usize) -> anyhow::Result<()> {
    let mut lanes = plan.lanes(true);
    let lane = &mut lanes[0];
    let mut family = Family::sized(WORKERS, PROMPT_BLOCKS, pairs, kind == "shared");
    let resident = clock::resident_bytes();
    clock::start_counting();
    lane.start(Setup { workers: WORKERS, event_threads: 1 });
    family.stores(per_event, true, |events| lane.load(&events));
    lane.settle();
    if kind == "churned" {
        for round in 1..=CHURN_ROUNDS {
            // Every block goes, deepest first, and others come.
            let heads = family.head_removals();
            family.removals(per_event, |events| lane.load(&events));
            lane.load(&heads);
            family = Family { seed: family.seed + round as u64, ..family };
            family.stores(per_event, true, |events: Vec<Event>| lane.load(&events));
            lane.settle();
        }
    }
    let bytes = clock::counted_bytes() + lane.unseen_bytes() as i64;
    let resident = clock::resident_bytes() - resident;
    let pairs = family.pairs() as f64;
    writeln!(std::io::stdout(), "{} {}", bytes as f64 / pairs, resident as f64 / pairs)?;
    // Freeing it all would only cost time.
    std::process::exit(0)
}
