//! kvlane's index beside its peers: one run, the same workloads, interleaved, every answer checked.
//!
//! `opponents all` answers every question, keeps the rows in `results/` and makes the tables and plots of BENCHMARKS.md from
//! them. Peers are linked here and nowhere else; no shipped crate depends on this one.

mod clock;
mod contender;
mod contenders;
mod exactness;
mod lane;
mod profile;
mod questions;
mod record;
mod report;
mod spread;
mod trace;
mod witness;
mod workload;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use questions::{Plan, exact, hashing, ingest, memory, mixed, query, removal, replay};

#[global_allocator]
static ALLOCATOR: clock::Counting = clock::Counting;

/// kvlane's index beside its peers.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    question: Question,
    /// Small sizes and few rounds: a few minutes, no figures to quote.
    #[arg(long, global = true)]
    quick: bool,
    /// Interleaved rounds.
    #[arg(long, global = true, default_value_t = 5)]
    rounds: usize,
    /// Only these (dynamo, dynamo-radix, chain, kvlane), by commas.
    #[arg(long, global = true, value_delimiter = ',')]
    only: Vec<String>,
    /// Where sheets are written and read.
    #[arg(long, global = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results"))]
    results: PathBuf,
    /// A trace in Mooncake's format (.jsonl or .jsonl.gz), for `replay`.
    #[arg(long, global = true, env = "KVLANE_TRACE")]
    trace: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Question {
    /// Every question, then the report.
    All,
    /// Share of wrong answers in hostile regimes.
    Exact,
    /// Cost of a query by workers, length and hit.
    Query,
    /// Cost of a stored and of a removed block.
    Ingest,
    /// Bytes of a (worker, block) pair.
    Memory,
    /// Queries beside a writer at full speed.
    Mixed,
    /// The same with 1 to 16 readers: for a machine with cores to spare.
    Readers {
        /// Numbers of readers.
        #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
        readers: Vec<usize>,
    },
    /// A recorded trace.
    Replay,
    /// Cost of losing a worker.
    Removal,
    /// From tokens to an answer.
    Hashing,
    /// Tables and plots of BENCHMARKS.md from the sheets.
    Report,
    /// One loop of one contender, for callgrind; see `profile.rs`.
    Profile(profile::Loop),
    /// Memory of one contender in this process.
    #[command(hide = true)]
    MemoryOf {
        /// Which.
        contender: String,
        /// distinct, shared or churned.
        kind: String,
        /// How many.
        pairs: usize,
        /// Blocks an event.
        per_event: usize,
    },
}

fn main() -> anyhow::Result<()> {
    let Arguments { question, quick, rounds, only, results, trace } = Arguments::parse();
    let rounds = if quick { rounds.min(3) } else { rounds };
    let folder = if quick { results.join("quick") } else { results.clone() };
    let plan = Plan { rounds, quick, only, folder, trace };
    match question {
        Question::All => {
            exact::run(&plan)?;
            query::run(&plan)?;
            ingest::run(&plan)?;
            memory::run(&plan)?;
            mixed::run(&plan, &[1])?;
            replay::run(&plan)?;
            removal::run(&plan)?;
            hashing::run(&plan)?;
            if quick { Ok(()) } else { report::run(&results) }
        }
        Question::Exact => exact::run(&plan),
        Question::Query => query::run(&plan),
        Question::Ingest => ingest::run(&plan),
        Question::Memory => memory::run(&plan),
        Question::Mixed => mixed::run(&plan, &[1]),
        Question::Readers { readers } => mixed::run(&plan, &readers),
        Question::Replay => replay::run(&plan),
        Question::Removal => removal::run(&plan),
        Question::Hashing => hashing::run(&plan),
        Question::Report => report::run(&results),
        Question::Profile(turn) => profile::run(&plan, &turn),
        Question::MemoryOf { contender, kind, pairs, per_event } => {
            memory::of(&Plan { only: vec![contender], ..plan }, &kind, pairs, per_event)
        }
    }
}
