//! What does a query cost, by number of workers, length of the prompt and share of it that is held?

use std::time::Duration;

use crate::contender::{Answer, Setup};
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::witness::Witness;
use crate::workload::Family;

/// Time for each contender, cell and round, once for the mean and once for the latencies.
const BUDGET: Duration = Duration::from_millis(30);
/// Answers checked in each cell.
const CHECKED: usize = 48;

/// Runs the grid.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "query", plan.rounds, plan.quick)?;
    let workers: &[usize] = if plan.quick { &[8, 512] } else { &[8, 64, 512, 2048] };
    let lengths: &[usize] = if plan.quick { &[64, 4096] } else { &[64, 512, 4096, 8192] };
    for &w in workers {
        for &length in lengths {
            let family = Family::sized(w, length, plan.size(1_000_000, 200_000), false);
            let mut witness = Witness::default();
            let mut lanes = plan.lanes(false);
            lanes.iter_mut().for_each(|lane| lane.start(Setup { workers: w, event_threads: 1 }));
            let mut loaded = 0;
            family.stores(64, true, |events| {
                lanes.iter_mut().for_each(|lane| lane.load(&events));
                events.iter().for_each(|event| witness.apply(event));
                loaded += 1;
                if loaded % 256 == 0 {
                    lanes.iter_mut().for_each(|lane| lane.settle());
                }
            });
            lanes.iter_mut().for_each(|lane| lane.settle());
            for hit in [0, 50, 100] {
                let prompts = family.prompts(hit, (1_000_000 / length).clamp(64, 4096));
                let right: Vec<Answer> =
                    prompts.iter().take(CHECKED).map(|prompt| witness.answer(prompt)).collect();
                lanes.iter_mut().for_each(|lane| lane.pose(&prompts));
                let ways: Vec<(usize, usize)> = (0..lanes.len())
                    .flat_map(|lane| (0..lanes[lane].ways().len()).map(move |way| (lane, way)))
                    .collect();
                let mut costs = vec![Vec::new(); ways.len()];
                interleave(plan.rounds, ways.len(), |_, turn| {
                    let (lane, way) = ways[turn];
                    costs[turn].push(lanes[lane].ask(way, BUDGET));
                });
                for (turn, (lane, way)) in ways.iter().enumerate() {
                    let figure =
                        |f: fn(&crate::lane::AskCost) -> f64| Spread::of(costs[turn].iter().map(f).collect());
                    sheet.row(
                        &[("workers", &w), ("blocks", &length), ("hit", &hit)],
                        lanes[*lane].ways()[*way],
                        &[
                            ("cpu_ns", figure(|c| c.cpu_ns)),
                            ("p50_ns", figure(|c| c.p50_ns)),
                            ("p99_ns", figure(|c| c.p99_ns)),
                        ],
                        Some(lanes[*lane].wrong(&right)),
                    );
                }
            }
        }
    }
    sheet.end()
}
