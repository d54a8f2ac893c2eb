//! What does it cost that a worker goes?

use kvlane_index::Worker;

use crate::contender::{Answer, Setup};
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::workload::Family;

const WORKERS: usize = 64;
const PROMPT_BLOCKS: usize = 512;

/// Runs both kinds at both sizes.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let mut sheet = Sheet::begin(&plan.folder, "removal", plan.rounds, plan.quick)?;
    let sizes: &[usize] = if plan.quick { &[200_000] } else { &[1_000_000, 10_000_000] };
    for &pairs in sizes {
        for shared in [false, true] {
            let family = Family::sized(WORKERS, PROMPT_BLOCKS, pairs, shared);
            let each = (family.pairs() / WORKERS) as f64;
            let mut lanes = plan.lanes(true);
            lanes.iter_mut().for_each(|lane| lane.start(Setup { workers: WORKERS, event_threads: 1 }));
            let mut witness = crate::witness::Witness::default();
            family.stores(64, true, |events| {
                lanes.iter_mut().for_each(|lane| lane.load(&events));
                events.iter().for_each(|event| witness.apply(event));
            });
            lanes.iter_mut().for_each(|lane| lane.settle());
            let mut rounds = vec![Vec::new(); lanes.len()];
            interleave(plan.rounds, lanes.len(), |round, turn| {
                rounds[turn].push(lanes[turn].remove(Worker::new(round as u64 * 5, 0)));
            });
            // Removed workers must be in no answer, the others as before.
            for round in 0..plan.rounds {
                let cleared = kvlane_index::KvEvent::Cleared { tier: None };
                witness.apply(&(Worker::new(round as u64 * 5, 0), cleared));
            }
            let prompts = family.prompts(100, 48);
            let right: Vec<Answer> = prompts.iter().map(|prompt| witness.answer(prompt)).collect();
            for (turn, lane) in lanes.iter_mut().enumerate() {
                lane.pose(&prompts);
                let figure =
                    |per: f64| Spread::of(rounds[turn].iter().map(|cost| cost.cpu_ns / per).collect());
                sheet.row(
                    &[("pairs", &pairs), ("kind", &if shared { "shared" } else { "distinct" })],
                    lane.ways()[0],
                    &[("cpu_us", figure(1e3)), ("pair_cpu_ns", figure(each))],
                    Some(lane.wrong(&right)),
                );
            }
        }
    }
    sheet.end()
}
