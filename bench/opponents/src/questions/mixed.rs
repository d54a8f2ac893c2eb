//! What do queries cost while events come in at full speed, and what do the events lose?
//!
//! The writer stores and removes other prompts than the readers ask for, so every answer has one right value throughout.

use std::time::Duration;

use crate::contender::{Answer, Event, Setup};
use crate::lane;
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::witness::Witness;
use crate::workload::Family;

const WORKERS: usize = 64;
const PROMPT_BLOCKS: usize = 512;
/// Times that the writer stores and removes its prompts.
const TURNS: usize = 3;

/// One reader beside one writer; with `readers`, as many as it lists.
pub fn run(plan: &Plan, readers: &[usize]) -> anyhow::Result<()> {
    let name = if readers == [1] { "mixed" } else { "readers" };
    let mut sheet = Sheet::begin(&plan.folder, name, plan.rounds, plan.quick)?;
    // How it scales does not depend on the size of events, which `mixed` varies.
    let sizes: &[usize] = if name == "mixed" { &[64, 1] } else { &[64] };
    for &per_event in sizes {
        for &readers in readers {
            cell(plan, &mut sheet, per_event, readers);
        }
    }
    sheet.end()
}

fn cell(plan: &Plan, sheet: &mut Sheet, per_event: usize, readers: usize) {
    let family = Family::sized(WORKERS, PROMPT_BLOCKS, plan.size(1_000_000, 200_000), false);
    let written = Family { seed: 4242, conversations: plan.size(16, 4), ..family };
    let mut events: Vec<Event> = Vec::new();
    for _ in 0..TURNS {
        written.stores(per_event, true, |more| events.extend(more));
        written.removals(per_event, |more| events.extend(more));
        events.extend(written.head_removals());
    }
    let blocks = lane::blocks(&events) as f64;

    let mut lanes = plan.lanes(false);
    let mut witness = Witness::default();
    lanes.iter_mut().for_each(|lane| lane.start(Setup { workers: WORKERS, event_threads: 1 }));
    family.stores(64, true, |more| {
        lanes.iter_mut().for_each(|lane| lane.load(&more));
        more.iter().for_each(|event| witness.apply(event));
    });
    lanes.iter_mut().for_each(|lane| lane.settle());
    let prompts = family.prompts(100, 2048);
    let right: Vec<Answer> = prompts.iter().take(48).map(|prompt| witness.answer(prompt)).collect();
    lanes.iter_mut().for_each(|lane| lane.pose(&prompts));

    let ways: Vec<(usize, usize)> =
        (0..lanes.len()).flat_map(|lane| (0..lanes[lane].ways().len()).map(move |way| (lane, way))).collect();
    let mut rounds = vec![Vec::new(); ways.len()];
    let mut wrong = vec![crate::exactness::Wrong::default(); ways.len()];
    interleave(plan.rounds, ways.len(), |_, turn| {
        let (lane, way) = ways[turn];
        let lane = &mut lanes[lane];
        let quiet = lane.ask(way, Duration::from_millis(20));
        lane.stage(&events);
        let cost = lane.mixed(way, readers);
        wrong[turn] += cost.wrong;
        wrong[turn] += lane.wrong(&right);
        rounds[turn].push((quiet, cost));
    });
    for (turn, (lane, way)) in ways.iter().enumerate() {
        let figure = |f: &dyn Fn(&(lane::AskCost, lane::MixedCost)) -> f64| {
            Spread::of(rounds[turn].iter().map(f).collect())
        };
        sheet.row(
            &[("per_event", &per_event), ("readers", &readers)],
            lanes[*lane].ways()[*way],
            &[
                ("ingest_mblocks_s", figure(&|r| r.1.ingest_mblocks_s * blocks)),
                ("ingest_cpu_ns", figure(&|r| r.1.ingest_cpu_ns / blocks)),
                ("queries_s", figure(&|r| r.1.queries_s)),
                ("queries_cpu_s", figure(&|r| r.1.queries_cpu_s)),
                ("quiet_p50_ns", figure(&|r| r.0.p50_ns)),
                ("quiet_p99_ns", figure(&|r| r.0.p99_ns)),
                ("p50_ns", figure(&|r| r.1.p50_ns)),
                ("p99_ns", figure(&|r| r.1.p99_ns)),
            ],
            Some(wrong[turn]),
        );
    }
}
