//! What does a recorded day of conversations cost, queries and events, the drain counted?

use std::time::Duration;

use crate::contender::{Answer, Event, Setup, Tally};
use crate::exactness::Wrong;
use crate::lane;
use crate::questions::{Plan, interleave};
use crate::record::Sheet;
use crate::spread::Spread;
use crate::trace::{Step, steps};
use crate::witness::Witness;

const WORKERS: usize = 64;
const CACHE_BLOCKS: usize = 16_384;

/// Runs the replay, the events alone and the queries alone; nothing without a trace.
pub fn run(plan: &Plan) -> anyhow::Result<()> {
    let Some(path) = &plan.trace else {
        println!("replay: skipped, no trace (give one with --trace)");
        return Ok(());
    };
    let mut sheet = Sheet::begin(&plan.folder, "replay", plan.rounds, plan.quick)?;
    let steps = steps(path, WORKERS, CACHE_BLOCKS, plan.size(usize::MAX, 1_000))?;
    let mut witness = Witness::default();
    let mut right = Vec::new();
    let mut prompts = Vec::new();
    let mut events: Vec<Event> = Vec::new();
    for step in &steps {
        match step {
            Step::Ask(prompt) => {
                let answer = witness.answer(prompt);
                let blocks = answer.values().map(|&d| u64::from(d)).sum();
                right.push(Tally { workers: answer.len(), blocks });
                prompts.push(prompt.clone());
            }
            Step::Apply(event) => {
                witness.apply(event);
                events.push(event.clone());
            }
        }
    }
    let last: Vec<Answer> = prompts.iter().map(|prompt| witness.answer(prompt)).collect();
    drop(witness);
    let event_blocks = lane::blocks(&events) as f64;
    let query_blocks: usize = prompts.iter().map(Vec::len).sum();

    let mut lanes = plan.lanes(true);
    let ways: Vec<(usize, usize)> =
        (0..lanes.len()).flat_map(|lane| (0..lanes[lane].ways().len()).map(move |way| (lane, way))).collect();
    let mut rounds = vec![Vec::new(); ways.len()];
    let mut live = vec![Wrong::default(); ways.len()];
    let mut quiet = vec![Wrong::default(); ways.len()];
    interleave(plan.rounds, ways.len(), |_, turn| {
        let (lane, way) = ways[turn];
        let lane = &mut lanes[lane];
        let setup = Setup { workers: WORKERS, event_threads: 1 };
        lane.start(setup);
        let replay = lane.replay(way, &steps, &right);
        lane.pose(&prompts);
        let asked = lane.ask(way, Duration::from_millis(1));
        quiet[turn] += lane.wrong(&last);
        live[turn] += replay.wrong;
        lane.start(setup);
        // One event a batch, as publishers hand them over.
        events.iter().for_each(|event| lane.stage(std::slice::from_ref(event)));
        let applied = lane.apply_staged(1);
        lane.stop();
        rounds[turn].push((replay, asked, applied));
    });
    for (turn, (lane, way)) in ways.iter().enumerate() {
        let figure = |f: &dyn Fn(&(lane::ReplayCost, lane::AskCost, lane::Cost)) -> f64| {
            Spread::of(rounds[turn].iter().map(f).collect())
        };
        let all_blocks = event_blocks + query_blocks as f64;
        sheet.row(
            &[
                ("requests", &prompts.len()),
                ("events", &events.len()),
                ("event_blocks", &event_blocks),
                ("query_blocks", &query_blocks),
            ],
            lanes[*lane].ways()[*way],
            &[
                ("cpu_s", figure(&|r| r.0.total.cpu_ns / 1e9)),
                ("mblocks_s", figure(&|r| all_blocks * 1e3 / r.0.total.wall_ns)),
                ("event_cpu_ns", figure(&|r| r.2.cpu_ns / event_blocks)),
                ("query_cpu_ns", figure(&|r| r.1.cpu_ns)),
                ("p50_ns", figure(&|r| r.1.p50_ns)),
                ("p99_ns", figure(&|r| r.1.p99_ns)),
                ("live_wrong_percent", Spread::of(vec![live[turn].percent()])),
            ],
            Some(quiet[turn]),
        );
    }
    sheet.end()
}
