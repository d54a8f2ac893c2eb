//! `kvlane index run FILE`: operations on one index partition, one JSON object a line, and its answers.
//!
//! For whoever wants to try the index or check it against a model of their own. The operations (`rank`, `group` and `parent` may be left out:
//! 0, 0 and null; `tier` is `device`, `host`, `disk` or `external`, by default `device`; hashes are unsigned 64-bit integers):
//!
//! ```text
//! {"op":"stored","worker":7,"rank":0,"tier":"device","group":0,"parent":null,"blocks":[[engine_hash,block_hash],…]}
//! {"op":"stored_by_hash","worker":7,"hashes":[engine_hash,…]}
//! {"op":"removed","worker":7,"hashes":[engine_hash,…]}
//! {"op":"cleared","worker":7}                      all ranks and tiers, unless `rank` or `tier` is given
//! {"op":"worker_removed","worker":7}
//! {"op":"rank_removed","worker":7,"rank":0}
//! {"op":"predicted","worker":7,"blocks":[block hashes from the root],"until":ms}
//! {"op":"expire","now":ms}
//! {"op":"query","blocks":[block_hash,…]}           answers one line
//! {"op":"dump"}                                    answers one line: operations that make an empty index hold the same
//! {"op":"stats"}                                   answers one line
//! ```
//!
//! A stored event may say what its group is: `"kind":"full"` (the default), `"sliding"` with `"window_tokens"`, or `"recurrent"`.
//! A query is answered by an array sorted by worker and rank, of each rank that holds anything of the prompt:
//! `{"worker":7,"rank":0,"device":2,"predicted":3,"host":1,"disk":0,"external":0}`. What an orphan, a copy or a second
//! name means is defined in `kvlane_index::reference`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use kvlane_index::reference::Oracle;
use kvlane_index::{
    BlockHash, BlockSize, EngineHash, Group, GroupId, GroupKind, Index, IndexConfig, IndexStats, IndexWriter,
    InstanceId, KvEvent, Overlaps, StoredBlock, Tier, Worker, partition,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Arguments of `kvlane index`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Apply operations, one JSON object a line, and print the answers to its queries.
    Run(RunArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// File of operations; `-` reads from stdin.
    file: PathBuf,

    /// Print the answers of the naive oracle instead of the index's.
    #[arg(long, conflicts_with = "check")]
    oracle: bool,

    /// Compare the index with the oracle, answer by answer; fail at the first difference.
    #[arg(long)]
    check: bool,

    /// Tokens in a block: what sliding windows are measured in.
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    block_size: u32,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum TierName {
    #[default]
    Device,
    Host,
    Disk,
    External,
}

impl From<TierName> for Tier {
    fn from(name: TierName) -> Self {
        match name {
            TierName::Device => Self::Device,
            TierName::Host => Self::Host,
            TierName::Disk => Self::Disk,
            TierName::External => Self::External,
        }
    }
}

impl From<Tier> for TierName {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::Host,
            Tier::Disk => Self::Disk,
            Tier::External => Self::External,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum KindName {
    #[default]
    Full,
    Sliding,
    Recurrent,
}

/// Where a block is, and for which group.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Place {
    worker: u64,
    #[serde(default)]
    rank: u32,
    #[serde(default)]
    tier: TierName,
    #[serde(default)]
    group: u16,
    #[serde(default)]
    kind: KindName,
    #[serde(default)]
    window_tokens: u32,
}

impl Place {
    fn new(worker: Worker, tier: Tier, group: Group) -> Self {
        let (kind, window_tokens) = match group.kind {
            GroupKind::Full => (KindName::Full, 0),
            GroupKind::Sliding { window_tokens } => (KindName::Sliding, window_tokens),
            GroupKind::Recurrent => (KindName::Recurrent, 0),
        };
        let (worker, rank) = (worker.instance.0, worker.rank);
        Self { worker, rank, tier: tier.into(), group: group.id.0, kind, window_tokens }
    }

    fn worker(self) -> Worker {
        Worker::new(self.worker, self.rank)
    }

    fn group(self) -> Group {
        let kind = match self.kind {
            KindName::Full => GroupKind::Full,
            KindName::Sliding => GroupKind::Sliding { window_tokens: self.window_tokens },
            KindName::Recurrent => GroupKind::Recurrent,
        };
        Group { id: GroupId(self.group), kind }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Stored {
        #[serde(flatten)]
        place: Place,
        #[serde(default)]
        parent: Option<u64>,
        blocks: Vec<(u64, u64)>,
    },
    StoredByHash {
        #[serde(flatten)]
        place: Place,
        hashes: Vec<u64>,
    },
    Removed {
        #[serde(flatten)]
        place: Place,
        hashes: Vec<u64>,
    },
    Cleared {
        worker: u64,
        #[serde(default)]
        rank: Option<u32>,
        #[serde(default)]
        tier: Option<TierName>,
    },
    WorkerRemoved {
        worker: u64,
    },
    RankRemoved {
        worker: u64,
        rank: u32,
    },
    Predicted {
        worker: u64,
        #[serde(default)]
        rank: u32,
        blocks: Vec<u64>,
        until: u64,
    },
    Expire {
        now: u64,
    },
    Query {
        blocks: Vec<u64>,
    },
    Dump,
    Stats,
}

fn names(hashes: &[u64]) -> Vec<EngineHash> {
    hashes.iter().copied().map(EngineHash).collect()
}

fn contents(hashes: &[u64]) -> Vec<BlockHash> {
    hashes.iter().copied().map(BlockHash).collect()
}

impl Op {
    /// The event that an operation is, if it is one of one worker.
    fn event(&self) -> Option<(Worker, KvEvent)> {
        Some(match self {
            Self::Stored { place, parent, blocks } => {
                let blocks = blocks
                    .iter()
                    .map(|&(engine, block)| StoredBlock {
                        engine: EngineHash(engine),
                        block: BlockHash(block),
                    })
                    .collect();
                let (tier, group, parent) = (place.tier.into(), place.group(), parent.map(EngineHash));
                (place.worker(), KvEvent::Stored { tier, group, parent, blocks })
            }
            Self::StoredByHash { place, hashes } => {
                let (tier, group) = (place.tier.into(), place.group());
                (place.worker(), KvEvent::StoredByHash { tier, group, hashes: names(hashes) })
            }
            Self::Removed { place, hashes } => {
                let (tier, group) = (place.tier.into(), GroupId(place.group));
                (place.worker(), KvEvent::Removed { tier, group, hashes: names(hashes) })
            }
            Self::Cleared { worker, rank: Some(rank), tier } => {
                (Worker::new(*worker, *rank), KvEvent::Cleared { tier: tier.map(Tier::from) })
            }
            _ => return None,
        })
    }

    /// The operation that an event is.
    fn of(worker: Worker, event: KvEvent) -> Self {
        let plain = |hashes: Vec<EngineHash>| hashes.into_iter().map(|h| h.0).collect();
        match event {
            KvEvent::Stored { tier, group, parent, blocks } => Self::Stored {
                place: Place::new(worker, tier, group),
                parent: parent.map(|p| p.0),
                blocks: blocks.into_iter().map(|b| (b.engine.0, b.block.0)).collect(),
            },
            KvEvent::StoredByHash { tier, group, hashes } => {
                Self::StoredByHash { place: Place::new(worker, tier, group), hashes: plain(hashes) }
            }
            KvEvent::Removed { tier, group, hashes } => {
                let group = Group { id: group, ..Group::default() };
                Self::Removed { place: Place::new(worker, tier, group), hashes: plain(hashes) }
            }
            KvEvent::Cleared { tier } => {
                let (rank, tier) = (Some(worker.rank), tier.map(TierName::from));
                Self::Cleared { worker: worker.instance.0, rank, tier }
            }
        }
    }
}

/// The index, the oracle or both.
struct Run {
    ours: Option<(IndexWriter, Index)>,
    oracle: Option<Oracle>,
    config: IndexConfig,
    overlaps: Overlaps,
}

impl Run {
    fn workers(&self) -> Vec<Worker> {
        let held = match (&self.ours, &self.oracle) {
            (Some((_, index)), _) => index.workers(),
            (None, Some(oracle)) => oracle.workers(),
            (None, None) => Vec::new(),
        };
        let mut workers: Vec<Worker> = held.iter().map(|held| held.worker).collect();
        workers.dedup();
        workers
    }

    fn apply(&mut self, worker: Worker, event: &KvEvent) -> anyhow::Result<()> {
        let ours = self.ours.as_mut().map(|(writer, _)| writer.apply(worker, event));
        let oracle = self.oracle.as_mut().map(|oracle| oracle.apply(worker, event));
        if let (Some(ours), Some(oracle)) = (ours, oracle) {
            ensure!(ours == oracle, "the index did {ours:?}, the oracle {oracle:?}");
        }
        Ok(())
    }

    fn remove(&mut self, instance: u64, rank: Option<u32>) {
        if let Some((writer, _)) = &mut self.ours {
            let _ = match rank {
                Some(rank) => writer.remove_worker(Worker::new(instance, rank)),
                None => writer.remove_instance(InstanceId(instance)),
            };
        }
        if let Some(oracle) = &mut self.oracle {
            let _ = match rank {
                Some(rank) => oracle.remove_worker(Worker::new(instance, rank)),
                None => oracle.remove_instance(InstanceId(instance)),
            };
        }
    }

    fn dump(&self, of: impl Fn(Worker) -> Vec<KvEvent>) -> Vec<(Worker, KvEvent)> {
        self.workers()
            .into_iter()
            .flat_map(|worker| of(worker).into_iter().map(move |event| (worker, event)))
            .collect()
    }

    /// A dump in the form that does not depend on who made it: what the oracle says after replaying it.
    fn canonical(&self, dump: &[(Worker, KvEvent)]) -> Vec<(Worker, KvEvent)> {
        let mut oracle = Oracle::new(&self.config);
        for (worker, event) in dump {
            let _ = oracle.apply(*worker, event);
        }
        self.dump(|worker| oracle.dump(worker))
    }

    /// Applies an operation; the line to print, if it asks something. Fails if index and oracle differ.
    fn step(&mut self, op: &Op) -> anyhow::Result<Option<String>> {
        if let Some((worker, event)) = op.event() {
            self.apply(worker, &event)?;
            return Ok(None);
        }
        match op {
            Op::Cleared { worker, tier: None, .. } | Op::WorkerRemoved { worker } => {
                self.remove(*worker, None);
            }
            Op::RankRemoved { worker, rank } => self.remove(*worker, Some(*rank)),
            Op::Cleared { worker, tier: Some(tier), .. } => {
                for rank in self.workers().into_iter().filter(|w| w.instance.0 == *worker) {
                    self.apply(rank, &KvEvent::Cleared { tier: Some((*tier).into()) })?;
                }
            }
            Op::Predicted { worker, rank, blocks, until } => {
                let (worker, blocks) = (Worker::new(*worker, *rank), contents(blocks));
                if let Some((_, index)) = &self.ours {
                    index.predict(worker, &blocks, *until);
                }
                if let Some(oracle) = &mut self.oracle {
                    oracle.predict(worker, &blocks, *until);
                }
            }
            Op::Expire { now } => {
                if let Some((_, index)) = &self.ours {
                    index.expire(*now);
                }
                if let Some(oracle) = &mut self.oracle {
                    oracle.expire(*now);
                }
            }
            Op::Query { blocks } => {
                let prompt = contents(blocks);
                if let Some((_, index)) = &self.ours {
                    index.overlap(&prompt, &mut self.overlaps);
                }
                if let Some(oracle) = &self.oracle {
                    let answer = oracle.overlap(&prompt);
                    if self.ours.is_some() {
                        let ours = &self.overlaps;
                        ensure!(
                            *ours == answer,
                            "the index answers {}, the oracle {}",
                            line(ours),
                            line(&answer)
                        );
                    }
                    self.overlaps = answer;
                }
                return Ok(Some(line(&self.overlaps)));
            }
            Op::Dump => {
                let ours = self.ours.as_ref().map(|(_, index)| self.dump(|worker| index.dump(worker)));
                let oracle = self.oracle.as_ref().map(|oracle| self.dump(|worker| oracle.dump(worker)));
                if let (Some(ours), Some(oracle)) = (&ours, &oracle) {
                    ensure!(self.canonical(ours) == self.canonical(oracle), "the dumps differ");
                }
                let events = ours.or(oracle).unwrap_or_default();
                let ops: Vec<Op> = events.into_iter().map(|(worker, event)| Op::of(worker, event)).collect();
                return Ok(Some(serde_json::to_string(&ops)?));
            }
            Op::Stats => {
                let ours = self.ours.as_ref().map(|(_, index)| index.stats());
                let oracle = self.oracle.as_ref().map(Oracle::stats);
                if let (Some(ours), Some(oracle)) = (ours, oracle) {
                    let figures = |s: IndexStats| [s.pairs, s.orphans, s.predicted];
                    ensure!(
                        figures(ours) == figures(oracle),
                        "the index counts {ours:?}, the oracle {oracle:?}"
                    );
                }
                let IndexStats { workers, pairs, places, runs, orphans, predicted, bytes } =
                    ours.or(oracle).unwrap_or_default();
                return Ok(Some(
                    json!({
                        "workers": workers, "pairs": pairs, "places": places, "runs": runs, "orphans": orphans,
                        "predicted": predicted, "bytes": bytes,
                    })
                    .to_string(),
                ));
            }
            Op::Stored { .. } | Op::StoredByHash { .. } | Op::Removed { .. } => {}
        }
        Ok(None)
    }
}

/// An answer as it is printed.
fn line(overlaps: &Overlaps) -> String {
    use std::fmt::Write as _;
    let mut out = String::from("[");
    for o in &overlaps.ranks {
        let separator = if out.len() > 1 { "," } else { "" };
        write!(
            out,
            r#"{separator}{{"worker":{},"rank":{},"device":{},"predicted":{},"host":{},"disk":{},"external":{}}}"#,
            o.worker.instance.0, o.worker.rank, o.device, o.predicted, o.host, o.disk, o.external
        )
        .expect("writing to a string cannot fail");
    }
    out.push(']');
    out
}

/// Runs `kvlane index`.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Command::Run(args) = args.command;
    let input: Box<dyn BufRead> = if args.file.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
        Box::new(BufReader::with_capacity(1 << 20, file))
    };
    execute(input, BufWriter::with_capacity(1 << 20, io::stdout().lock()), &args)
}

fn execute(mut input: impl BufRead, mut out: impl Write, args: &RunArgs) -> anyhow::Result<()> {
    let Some(block_size) = BlockSize::new(args.block_size) else { bail!("--block-size must be at least 1") };
    let config = IndexConfig::new(block_size);
    let mut run = Run {
        ours: (!args.oracle).then(|| partition(config)),
        oracle: (args.oracle || args.check).then(|| Oracle::new(&config)),
        config,
        overlaps: Overlaps::default(),
    };
    let (mut text, mut number, mut answers) = (Vec::new(), 0u64, 0u64);
    while input.read_until(b'\n', &mut text)? > 0 {
        number += 1;
        if !text.trim_ascii().is_empty() {
            let op: Op = serde_json::from_slice(&text).with_context(|| {
                format!("line {number} is not an operation; see `kvlane index run --help`")
            })?;
            let answer = run.step(&op).with_context(|| format!("line {number}"))?;
            if let Some(answer) = answer {
                answers += 1;
                if !args.check {
                    writeln!(out, "{answer}")?;
                }
            }
        }
        text.clear();
    }
    if args.check {
        writeln!(out, "{}", json!({ "lines": number, "answers": answers, "different": 0 }))?;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &str, wanted: &str) {
        for (oracle, check) in [(false, false), (true, false), (false, true)] {
            let args = RunArgs { file: PathBuf::new(), oracle, check, block_size: 16 };
            let mut out = Vec::new();
            execute(lines.as_bytes(), &mut out, &args).unwrap();
            if !check {
                assert_eq!(String::from_utf8(out).unwrap().trim(), wanted, "oracle: {oracle}");
            }
        }
    }

    #[test]
    fn tiers_continue_the_device_run_and_holes_count_again_when_filled() {
        check(
            r#"{"op":"stored","worker":7,"blocks":[[100,1],[101,2],[18446744073709551615,3]]}
{"op":"stored","worker":7,"tier":"host","parent":18446744073709551615,"blocks":[[103,4]]}
{"op":"removed","worker":7,"hashes":[100]}
{"op":"query","blocks":[1,2,3,4,5]}
{"op":"stored","worker":7,"blocks":[[200,1]]}
{"op":"predicted","worker":7,"blocks":[1,2,3,9],"until":50}
{"op":"query","blocks":[1,2,3,4,5]}
{"op":"query","blocks":[1,2,3,9]}
{"op":"expire","now":50}
{"op":"query","blocks":[1,2,3,9]}
{"op":"cleared","worker":7}
{"op":"query","blocks":[1]}"#,
            r#"[]
[{"worker":7,"rank":0,"device":3,"predicted":3,"host":1,"disk":0,"external":0}]
[{"worker":7,"rank":0,"device":3,"predicted":4,"host":0,"disk":0,"external":0}]
[{"worker":7,"rank":0,"device":3,"predicted":3,"host":0,"disk":0,"external":0}]
[]"#,
        );
    }

    #[test]
    fn a_dump_can_be_run() {
        let lines = r#"{"op":"stored","worker":1,"blocks":[[10,1],[11,2]]}
{"op":"stored","worker":1,"tier":"disk","parent":11,"blocks":[[12,3]]}
{"op":"removed","worker":1,"hashes":[10]}
{"op":"dump"}"#;
        let args = RunArgs { file: PathBuf::new(), oracle: false, check: false, block_size: 16 };
        let mut out = Vec::new();
        execute(lines.as_bytes(), &mut out, &args).unwrap();
        let ops: Vec<Op> = serde_json::from_slice(&out).unwrap();
        let mut again: String = ops.iter().map(|op| serde_json::to_string(op).unwrap() + "\n").collect();
        again += r#"{"op":"stored","worker":1,"blocks":[[10,1]]}
{"op":"query","blocks":[1,2,3]}"#;
        check(&again, r#"[{"worker":1,"rank":0,"device":2,"predicted":2,"host":0,"disk":1,"external":0}]"#);
    }

    #[test]
    fn a_bad_line_is_named() {
        let args = RunArgs { file: PathBuf::new(), oracle: false, check: false, block_size: 16 };
        let error =
            execute("{\"op\":\"stats\"}\n{\"op\":\"fly\"}".as_bytes(), Vec::new(), &args).unwrap_err();
        assert!(error.to_string().starts_with("line 2"), "{error}");
    }
}
