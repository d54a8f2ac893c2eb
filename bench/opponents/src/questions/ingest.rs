//! What does a stored or removed block cost?
//!
//! *fill*: stores into an empty index (it grows, pages fault). *remove*: every conversation's own blocks, deepest
//! first. *steady*: the same blocks again, into an index that has been that large before.

use crate::contender::{Answer, Event, Setup};
use crate::lane;
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::witness::Witness;
use crate::workload::Family;

const WORKERS: usize = 64;
const PROMPT_BLOCKS: usize = 512;

/// Runs all kinds.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "ingest", plan.rounds, plan.quick)?;
    let pairs = plan.size(1_000_000, 200_000);
    for shared in [false, true] {
        for per_event in [1, 64] {
            for publishers in [1, 2] {
                cell(plan, &mut sheet, pairs, shared, per_event, publishers);
            }
        }
    }
    if !plan.quick {
        cell(plan, &mut sheet, 10_000_000, false, 64, 1);
    }
    sheet.end()
}

fn cell(plan: &Plan, sheet: &mut Sheet, pairs: usize, shared: bool, per_event: usize, publishers: usize) {
    let family = Family::sized(WORKERS, PROMPT_BLOCKS, pairs, shared);
    let mut lanes = plan.lanes(publishers == 1);
    let [mut stores, mut again, mut removals] = [const { Vec::<Event>::new() }; 3];
    family.stores(per_event, true, |events| stores.extend(events));
    family.stores(per_event, false, |events| again.extend(events));
    family.removals(per_event, |events| removals.extend(events));
    let mut witness = Witness::default();
    stores.iter().for_each(|event| witness.apply(event));
    let prompts = family.prompts(100, 48);
    let right: Vec<Answer> = prompts.iter().map(|prompt| witness.answer(prompt)).collect();
    drop(witness);

    let (stored, removed) = (lane::blocks(&stores) as f64, lane::blocks(&removals) as f64);
    let mut rounds = vec![Vec::new(); lanes.len()];
    let mut wrong = vec![crate::exactness::Wrong::default(); lanes.len()];
    interleave(plan.rounds, lanes.len(), |_, turn| {
        let lane = &mut lanes[turn];
        lane.start(Setup { workers: WORKERS, event_threads: publishers });
        lane.stage(&stores);
        let fill = lane.apply_staged(publishers);
        lane.stage(&removals);
        let remove = lane.apply_staged(publishers);
        lane.stage(&again);
        let steady = lane.apply_staged(publishers);
        lane.pose(&prompts);
        wrong[turn] += lane.wrong(&right);
        lane.stop();
        rounds[turn].push((fill, remove, steady));
    });
    for (turn, lane) in lanes.iter().enumerate() {
        let figure = |f: &dyn Fn(&(lane::Cost, lane::Cost, lane::Cost)) -> f64| {
            Spread::of(rounds[turn].iter().map(f).collect())
        };
        sheet.row(
            &[
                ("pairs", &family.pairs()),
                ("kind", &if shared { "shared" } else { "distinct" }),
                ("per_event", &per_event),
                ("publishers", &publishers),
            ],
            lane.ways()[0],
            &[
                ("fill_cpu_ns", figure(&|r| r.0.cpu_ns / stored)),
                ("remove_cpu_ns", figure(&|r| r.1.cpu_ns / removed)),
                ("steady_cpu_ns", figure(&|r| r.2.cpu_ns / removed)),
                ("fill_mblocks_s", figure(&|r| stored * 1e3 / r.0.wall_ns)),
                ("remove_mblocks_s", figure(&|r| removed * 1e3 / r.1.wall_ns)),
                ("steady_mblocks_s", figure(&|r| removed * 1e3 / r.2.wall_ns)),
            ],
            Some(wrong[turn]),
        );
    }
}
