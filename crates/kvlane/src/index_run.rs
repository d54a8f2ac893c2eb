//! `kvlane index run FILE`: operations on one index partition, one JSON object a line, and its answers.
//!
//! For whoever wants to try the index or check it against a model of their own. The format is in `docs/index-run.md` (and, shorter, in
//! `--help`). What an orphan, a copy or a second name means is defined in `kvlane_index::reference`.
//!
//! A line is read in one pass into one flat struct of all fields ([`Line`]), whose fields are then held against what its operation
//! takes: faster than an enum tagged by a field, which would keep each line in a tree first, and its errors name the field.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use kvlane_index::reference::Oracle;
use kvlane_index::{
    Applied, BlockHash, BlockSize, EngineHash, Group, GroupId, GroupKind, Index, IndexConfig, IndexStats,
    IndexWriter, InstanceId, KvEvent, Overlaps, StoredBlock, Tier, Worker, partition,
};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::json;

/// Lines between two looks at the clock, for the progress on a terminal.
const LOOK_EVERY: u64 = 1 << 14;

const EXAMPLES: &str = r#"Operations, one JSON object a line (rank, group: 0 if left out; tier: device; parent: null = first block of a prompt):
  {"op":"stored","worker":7,"rank":0,"tier":"device","group":0,"parent":null,"blocks":[[engine_hash,block_hash],...]}
  {"op":"stored_by_hash","worker":7,"hashes":[engine_hash,...]}
  {"op":"removed","worker":7,"rank":0,"tier":"device","group":0,"hashes":[engine_hash,...]}
  {"op":"cleared","worker":7}               all ranks and tiers, unless "rank" or "tier" is given
  {"op":"worker_removed","worker":7}
  {"op":"rank_removed","worker":7,"rank":0}
  {"op":"predicted","worker":7,"rank":0,"blocks":[block_hash,...],"until":ms}
  {"op":"expire","now":ms}
  {"op":"query","blocks":[block_hash,...]}  answers one line
  {"op":"dump"}                             answers one line: operations that give an empty index the same
  {"op":"stats"}                            answers one line

Hashes are unsigned 64-bit integers; tiers: device, host, disk, external. More in docs/index-run.md.
Exit status: 0; 1 for a bad line, an unreadable file or, with --check, the first difference."#;

/// Arguments of `kvlane index`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Apply operations, one JSON object a line, and print the answers to its queries.
    #[command(after_help = EXAMPLES)]
    Run(RunArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// File of operations; `-` reads from stdin.
    file: PathBuf,

    /// Print the answers of the naive oracle instead of the index's.
    #[arg(long, conflicts_with = "check")]
    oracle: bool,

    /// Compare the index with the oracle, operation by operation; fail at the first difference.
    #[arg(long)]
    check: bool,

    /// Tokens in a block: what sliding windows are measured in.
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    block_size: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Name {
    Stored,
    StoredByHash,
    Removed,
    Cleared,
    WorkerRemoved,
    RankRemoved,
    Predicted,
    Expire,
    Query,
    Dump,
    Stats,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TierName {
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

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindName {
    Full,
    Sliding,
    Recurrent,
}

/// A list of hashes or of pairs of them: which, the operation says.
#[derive(Debug, Default)]
struct Blocks {
    plain: Vec<BlockHash>,
    pairs: Vec<StoredBlock>,
}

/// One element of [`Blocks`].
enum Block {
    Plain(u64),
    Pair(u64, u64),
}

impl<'de> Deserialize<'de> for Block {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Block;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an unsigned 64-bit hash or a pair [engine_hash, block_hash]")
            }

            fn visit_u64<E>(self, hash: u64) -> Result<Block, E> {
                Ok(Block::Plain(hash))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Block, A::Error> {
                let (Some(engine), Some(block)) = (pair.next_element()?, pair.next_element()?) else {
                    return Err(A::Error::custom("a pair is [engine_hash, block_hash]"));
                };
                match pair.next_element::<u64>()? {
                    None => Ok(Block::Pair(engine, block)),
                    Some(_) => Err(A::Error::custom("a pair is [engine_hash, block_hash]")),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Blocks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of hashes or of pairs [engine_hash, block_hash]")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Blocks, A::Error> {
                let mut blocks = Blocks::default();
                while let Some(block) = list.next_element()? {
                    match block {
                        Block::Plain(hash) => blocks.plain.push(BlockHash(hash)),
                        Block::Pair(engine, block) => blocks
                            .pairs
                            .push(StoredBlock { engine: EngineHash(engine), block: BlockHash(block) }),
                    }
                }
                Ok(blocks)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// A line: all fields that some operation takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    op: Name,
    worker: Option<u64>,
    rank: Option<u32>,
    tier: Option<TierName>,
    group: Option<u16>,
    kind: Option<KindName>,
    window_tokens: Option<u32>,
    parent: Option<u64>,
    blocks: Option<Blocks>,
    hashes: Option<Vec<u64>>,
    until: Option<u64>,
    now: Option<u64>,
}

/// An operation.
#[derive(Debug)]
enum Op {
    Event(Worker, KvEvent),
    /// In all ranks of an instance.
    Cleared(u64, Option<Tier>),
    WorkerRemoved(u64),
    RankRemoved(Worker),
    Predicted(Worker, Vec<BlockHash>, u64),
    Expire(u64),
    Query(Vec<BlockHash>),
    Dump,
    Stats,
}

/// The value of a field that the operation needs.
fn needed<T>(field: &str, value: Option<T>) -> anyhow::Result<T> {
    value.ok_or_else(|| anyhow!("the field `{field}` is missing"))
}

impl Line {
    /// Fails if a field is given that the operation does not take.
    fn takes_only(&self, fields: &[&str]) -> anyhow::Result<()> {
        let given = [
            ("worker", self.worker.is_some()),
            ("rank", self.rank.is_some()),
            ("tier", self.tier.is_some()),
            ("group", self.group.is_some()),
            ("kind", self.kind.is_some()),
            ("window_tokens", self.window_tokens.is_some()),
            ("parent", self.parent.is_some()),
            ("blocks", self.blocks.is_some()),
            ("hashes", self.hashes.is_some()),
            ("until", self.until.is_some()),
            ("now", self.now.is_some()),
        ];
        match given.iter().find(|(field, given)| *given && !fields.contains(field)) {
            Some((field, _)) => {
                bail!("this operation has no field `{field}`; it takes {}", fields.join(", "))
            }
            None => Ok(()),
        }
    }

    fn worker(&self) -> anyhow::Result<Worker> {
        Ok(Worker::new(needed("worker", self.worker)?, self.rank.unwrap_or(0)))
    }

    fn group(&self) -> anyhow::Result<Group> {
        let kind = match (self.kind, self.window_tokens) {
            (None | Some(KindName::Full), None) => GroupKind::Full,
            (Some(KindName::Recurrent), None) => GroupKind::Recurrent,
            (Some(KindName::Sliding), Some(window_tokens)) => GroupKind::Sliding { window_tokens },
            _ => bail!("`window_tokens` and the kind \"sliding\" need one another"),
        };
        Ok(Group { id: GroupId(self.group.unwrap_or(0)), kind })
    }

    fn names(&mut self) -> anyhow::Result<Vec<EngineHash>> {
        Ok(needed("hashes", self.hashes.take())?.into_iter().map(EngineHash).collect())
    }

    fn prompt(&mut self) -> anyhow::Result<Vec<BlockHash>> {
        let Blocks { plain, pairs } = needed("blocks", self.blocks.take())?;
        ensure!(pairs.is_empty(), "here `blocks` is a list of block hashes, not of pairs");
        Ok(plain)
    }

    fn into_op(mut self) -> anyhow::Result<Op> {
        let tier = self.tier.map_or(Tier::Device, Tier::from);
        Ok(match self.op {
            Name::Stored => {
                self.takes_only(&[
                    "worker",
                    "rank",
                    "tier",
                    "group",
                    "kind",
                    "window_tokens",
                    "parent",
                    "blocks",
                ])?;
                let Blocks { plain, pairs: blocks } = needed("blocks", self.blocks.take())?;
                ensure!(plain.is_empty(), "here `blocks` is a list of pairs [engine_hash, block_hash]");
                let parent = self.parent.map(EngineHash);
                Op::Event(self.worker()?, KvEvent::Stored { tier, group: self.group()?, parent, blocks })
            }
            Name::StoredByHash => {
                self.takes_only(&["worker", "rank", "tier", "group", "kind", "window_tokens", "hashes"])?;
                let hashes = self.names()?;
                Op::Event(self.worker()?, KvEvent::StoredByHash { tier, group: self.group()?, hashes })
            }
            Name::Removed => {
                self.takes_only(&["worker", "rank", "tier", "group", "hashes"])?;
                let (hashes, group) = (self.names()?, GroupId(self.group.unwrap_or(0)));
                Op::Event(self.worker()?, KvEvent::Removed { tier, group, hashes })
            }
            Name::Cleared => {
                self.takes_only(&["worker", "rank", "tier"])?;
                let (worker, tier) = (self.worker()?, self.tier.map(Tier::from));
                match self.rank {
                    Some(_) => Op::Event(worker, KvEvent::Cleared { tier }),
                    None => Op::Cleared(worker.instance.0, tier),
                }
            }
            Name::WorkerRemoved => {
                self.takes_only(&["worker"])?;
                Op::WorkerRemoved(needed("worker", self.worker)?)
            }
            Name::RankRemoved => {
                self.takes_only(&["worker", "rank"])?;
                needed("rank", self.rank)?;
                Op::RankRemoved(self.worker()?)
            }
            Name::Predicted => {
                self.takes_only(&["worker", "rank", "blocks", "until"])?;
                let prompt = self.prompt()?;
                Op::Predicted(self.worker()?, prompt, needed("until", self.until)?)
            }
            Name::Expire => {
                self.takes_only(&["now"])?;
                Op::Expire(needed("now", self.now)?)
            }
            Name::Query => {
                self.takes_only(&["blocks"])?;
                Op::Query(self.prompt()?)
            }
            Name::Dump => {
                self.takes_only(&[])?;
                Op::Dump
            }
            Name::Stats => {
                self.takes_only(&[])?;
                Op::Stats
            }
        })
    }
}

/// An event of a dump as an operation.
fn operation(worker: Worker, event: &KvEvent) -> serde_json::Value {
    let (op, tier, group) = match event {
        KvEvent::Stored { tier, group, .. } => ("stored", *tier, *group),
        KvEvent::StoredByHash { tier, group, .. } => ("stored_by_hash", *tier, *group),
        KvEvent::Removed { tier, group, .. } => ("removed", *tier, Group { id: *group, ..Group::default() }),
        KvEvent::Cleared { .. } => unreachable!("a dump clears nothing"),
    };
    let mut out = json!({
        "op": op, "worker": worker.instance.0, "rank": worker.rank, "tier": tier.name(), "group": group.id.0,
    });
    match group.kind {
        GroupKind::Full => {}
        GroupKind::Sliding { window_tokens } => {
            out["kind"] = "sliding".into();
            out["window_tokens"] = window_tokens.into();
        }
        GroupKind::Recurrent => out["kind"] = "recurrent".into(),
    }
    match event {
        KvEvent::Stored { parent, blocks, .. } => {
            out["parent"] = json!(parent.map(|p| p.0));
            out["blocks"] = blocks.iter().map(|b| json!([b.engine.0, b.block.0])).collect();
        }
        KvEvent::StoredByHash { hashes, .. } | KvEvent::Removed { hashes, .. } => {
            out["hashes"] = hashes.iter().map(|h| json!(h.0)).collect();
        }
        KvEvent::Cleared { .. } => {}
    }
    out
}

/// The index, the oracle or both.
struct Run {
    ours: Option<(IndexWriter, Index)>,
    oracle: Option<Oracle>,
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

    /// Does the same on either side; what it did must be the same.
    fn both(
        &mut self,
        ours: impl FnOnce(&mut IndexWriter) -> Applied,
        oracle: impl FnOnce(&mut Oracle) -> Applied,
    ) -> anyhow::Result<()> {
        let ours = self.ours.as_mut().map(|(writer, _)| ours(writer));
        let theirs = self.oracle.as_mut().map(oracle);
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            ensure!(ours == theirs, "the index did {ours:?}, the oracle {theirs:?}");
        }
        Ok(())
    }

    fn dump(&self, of: impl Fn(Worker) -> Vec<KvEvent>) -> Vec<(Worker, KvEvent)> {
        self.workers()
            .into_iter()
            .flat_map(|worker| of(worker).into_iter().map(move |event| (worker, event)))
            .collect()
    }

    /// Applies an operation; whether there is an answer, which is then in `out`. Fails if index and oracle differ.
    fn step(&mut self, op: Op, out: &mut String) -> anyhow::Result<bool> {
        out.clear();
        match op {
            Op::Event(worker, event) => {
                self.both(|writer| writer.apply(worker, &event), |oracle| oracle.apply(worker, &event))?;
            }
            Op::Cleared(instance, None) | Op::WorkerRemoved(instance) => {
                let instance = InstanceId(instance);
                self.both(|w| w.remove_instance(instance), |o| o.remove_instance(instance))?;
            }
            Op::RankRemoved(worker) => {
                self.both(|w| w.remove_worker(worker), |o| o.remove_worker(worker))?;
            }
            Op::Cleared(instance, tier) => {
                for rank in self.workers().into_iter().filter(|w| w.instance.0 == instance) {
                    let event = KvEvent::Cleared { tier };
                    self.both(|writer| writer.apply(rank, &event), |oracle| oracle.apply(rank, &event))?;
                }
            }
            Op::Predicted(worker, blocks, until) => {
                if let Some((_, index)) = &self.ours {
                    index.predict(worker, &blocks, until);
                }
                if let Some(oracle) = &mut self.oracle {
                    oracle.predict(worker, &blocks, until);
                }
            }
            Op::Expire(now) => {
                if let Some((_, index)) = &self.ours {
                    index.expire(now);
                }
                if let Some(oracle) = &mut self.oracle {
                    oracle.expire(now);
                }
            }
            Op::Query(prompt) => {
                if let Some((_, index)) = &self.ours {
                    index.overlap(&prompt, &mut self.overlaps);
                }
                if let Some(oracle) = &self.oracle {
                    let answer = oracle.overlap(&prompt);
                    if self.ours.is_some() && self.overlaps != answer {
                        let (mut ours, mut theirs) = (String::new(), String::new());
                        line(&self.overlaps, &mut ours);
                        line(&answer, &mut theirs);
                        bail!("the index answers {ours}, the oracle {theirs}");
                    }
                    self.overlaps = answer;
                }
                line(&self.overlaps, out);
                return Ok(true);
            }
            Op::Dump => {
                let ours = self.ours.as_ref().map(|(_, index)| self.dump(|worker| index.dump(worker)));
                let oracle = self.oracle.as_ref().map(|oracle| self.dump(|worker| oracle.dump(worker)));
                if let (Some(ours), Some(oracle)) = (&ours, &oracle) {
                    ensure!(ours == oracle, "the dumps differ");
                }
                let events = ours.or(oracle).unwrap_or_default();
                let ops = events.iter().map(|(worker, event)| operation(*worker, event)).collect();
                *out = serde_json::Value::Array(ops).to_string();
                return Ok(true);
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
                let IndexStats { workers, pairs, places, runs, orphans, predicted, bytes, .. } =
                    ours.or(oracle).unwrap_or_default();
                *out = json!({
                    "workers": workers, "pairs": pairs, "places": places, "runs": runs, "orphans": orphans,
                    "predicted": predicted, "bytes": bytes,
                })
                .to_string();
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// An answer as it is printed.
fn line(overlaps: &Overlaps, out: &mut String) {
    use std::fmt::Write as _;
    out.push('[');
    for (at, o) in overlaps.ranks.iter().enumerate() {
        let separator = if at > 0 { "," } else { "" };
        write!(
            out,
            r#"{separator}{{"worker":{},"rank":{},"device":{},"predicted":{},"host":{},"disk":{},"external":{}}}"#,
            o.worker.instance.0, o.worker.rank, o.device, o.predicted, o.host, o.disk, o.external
        )
        .expect("writing to a string cannot fail");
    }
    out.push(']');
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
    let progress = Progress::new(io::stderr().is_terminal());
    execute(input, BufWriter::with_capacity(1 << 20, io::stdout().lock()), &args, progress)
}

/// Lines so far, for a person who waits.
struct Progress {
    shown: bool,
    start: Instant,
    last: Instant,
}

impl Progress {
    fn new(shown: bool) -> Self {
        let start = Instant::now();
        Self { shown, start, last: start }
    }

    fn tell(&mut self, lines: u64) {
        if self.shown && lines.is_multiple_of(LOOK_EVERY) && self.last.elapsed() > Duration::from_millis(500)
        {
            self.last = Instant::now();
            let rate = lines as f64 / self.start.elapsed().as_secs_f64();
            let _ = write!(io::stderr(), "\r{lines} lines, {rate:.0} a second ");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown && self.last != self.start {
            let _ = writeln!(io::stderr());
        }
    }
}

fn parse(text: &[u8]) -> anyhow::Result<Op> {
    // Its line is always 1.
    let named =
        |error: serde_json::Error| anyhow!("{}", error.to_string().replace(" at line 1 column", ", column"));
    serde_json::from_slice::<Line>(text).map_err(named)?.into_op()
}

fn execute(
    mut input: impl BufRead,
    mut out: impl Write,
    args: &RunArgs,
    mut progress: Progress,
) -> anyhow::Result<()> {
    let Some(block_size) = BlockSize::new(args.block_size) else { bail!("--block-size must be at least 1") };
    // `now` of an operation may be any number, so it says nothing about how long an orphan has waited.
    let config = IndexConfig { max_orphan_age_ms: u64::MAX, ..IndexConfig::new(block_size) };
    let mut run = Run {
        ours: (!args.oracle).then(|| partition(config)),
        oracle: (args.oracle || args.check).then(|| Oracle::new(&config)),
        overlaps: Overlaps::default(),
    };
    let (mut text, mut number, mut answers, mut answer) = (Vec::new(), 0u64, 0u64, String::new());
    while input.read_until(b'\n', &mut text).with_context(|| format!("cannot read line {}", number + 1))? > 0
    {
        number += 1;
        let trimmed = text.trim_ascii();
        if !trimmed.is_empty() {
            let op = parse(trimmed).with_context(|| {
                format!("line {number} is not an operation (`kvlane index run --help` lists them)")
            });
            let stepped =
                op.and_then(|op| run.step(op, &mut answer).with_context(|| format!("line {number}")));
            if stepped.is_err() {
                // What was answered before it stands.
                out.flush()?;
            }
            if stepped? {
                answers += 1;
                if !args.check {
                    answer.push('\n');
                    out.write_all(answer.as_bytes())?;
                }
            }
        }
        text.clear();
        progress.tell(number);
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

    fn answers(lines: &str, oracle: bool, check: bool) -> anyhow::Result<String> {
        let args = RunArgs { file: PathBuf::new(), oracle, check, block_size: 16 };
        let mut out = Vec::new();
        execute(lines.as_bytes(), &mut out, &args, Progress::new(false))?;
        Ok(String::from_utf8(out)?)
    }

    fn check(lines: &str, wanted: &str) {
        for (oracle, check) in [(false, false), (true, false), (false, true)] {
            let found = answers(lines, oracle, check).unwrap();
            if !check {
                assert_eq!(found.trim(), wanted, "oracle: {oracle}");
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
    fn clearing_is_of_all_ranks_and_tiers_unless_said_otherwise() {
        let stored = r#"{"op":"stored","worker":7,"blocks":[[1,1]]}
{"op":"stored","worker":7,"rank":3,"blocks":[[1,1]]}
{"op":"stored","worker":7,"rank":3,"tier":"host","parent":1,"blocks":[[2,2]]}
{"op":"stored","worker":8,"blocks":[[1,1]]}
"#;
        let answer = |worker: u64, rank: u32, device: u32, host: u32| {
            format!(
                r#"{{"worker":{worker},"rank":{rank},"device":{device},"predicted":{device},"host":{host},"disk":0,"external":0}}"#
            )
        };
        let (first, third, other) = (answer(7, 0, 1, 0), answer(7, 3, 1, 1), answer(8, 0, 1, 0));
        for (op, left) in [
            (r#"{"op":"cleared","worker":7}"#, format!("[{other}]")),
            (r#"{"op":"worker_removed","worker":7}"#, format!("[{other}]")),
            (r#"{"op":"cleared","worker":7,"rank":3}"#, format!("[{first},{other}]")),
            (r#"{"op":"rank_removed","worker":7,"rank":0}"#, format!("[{third},{other}]")),
            (
                r#"{"op":"cleared","worker":7,"tier":"host"}"#,
                format!("[{first},{},{other}]", answer(7, 3, 1, 0)),
            ),
            (r#"{"op":"cleared","worker":7,"rank":0,"tier":"device"}"#, format!("[{third},{other}]")),
        ] {
            check(&format!("{stored}{op}\n{{\"op\":\"query\",\"blocks\":[1,2]}}"), &left);
        }
    }

    #[test]
    fn a_dump_is_canonical_and_can_be_run() {
        let lines = r#"{"op":"stored","worker":1,"blocks":[[10,1],[11,2]]}
{"op":"stored","worker":1,"tier":"disk","parent":11,"blocks":[[12,3]]}
{"op":"stored","worker":1,"group":2,"kind":"sliding","window_tokens":64,"parent":11,"blocks":[[13,7]]}
{"op":"stored","worker":1,"rank":1,"group":3,"kind":"recurrent","blocks":[[14,7]]}
{"op":"removed","worker":1,"hashes":[10]}
{"op":"dump"}"#;
        let dump = answers(lines, false, true).and_then(|_| answers(lines, false, false)).unwrap();
        assert_eq!(dump, answers(lines, true, false).unwrap(), "index and oracle write the same dump");
        let ops: Vec<serde_json::Value> = serde_json::from_str(&dump).unwrap();
        let again: String = ops.iter().map(|op| format!("{op}\n")).collect();
        assert_eq!(answers(&format!("{again}{{\"op\":\"dump\"}}"), false, false).unwrap(), dump);
        check(
            &format!(
                "{again}{}",
                r#"{"op":"stored","worker":1,"blocks":[[10,1]]}
{"op":"removed","worker":1,"group":2,"hashes":[13]}
{"op":"stored","worker":1,"group":2,"kind":"full","parent":11,"blocks":[]}
{"op":"query","blocks":[7]}"#
            ),
            r#"[{"worker":1,"rank":1,"device":1,"predicted":1,"host":0,"disk":0,"external":0}]"#,
        );
    }

    #[test]
    fn a_bad_line_is_named_with_what_is_wrong_with_it() {
        for (bad, why) in [
            (r#"{"op":"fly"}"#, "unknown variant `fly`"),
            (r#"{"op":"query"}"#, "the field `blocks` is missing"),
            (r#"{"op":"query","blocks":[[1,2]]}"#, "not of pairs"),
            (r#"{"op":"query","blocks":[-1]}"#, "invalid type: integer `-1`"),
            (r#"{"op":"query","blocks":[18446744073709551616]}"#, "invalid type: floating point"),
            (r#"{"op":"query","blocks":[1],"until":3}"#, "no field `until`; it takes blocks"),
            (r#"{"op":"query","block":[1]}"#, "unknown field `block`"),
            (r#"{"op":"stored","worker":1,"blocks":[1]}"#, "list of pairs"),
            (r#"{"op":"stored","worker":1,"blocks":[[1,2,3]]}"#, "a pair is [engine_hash, block_hash]"),
            (r#"{"op":"stored","blocks":[[1,2]]}"#, "the field `worker` is missing"),
            (r#"{"op":"stored","worker":1,"kind":"sliding","blocks":[[1,2]]}"#, "need one another"),
            (r#"{"op":"stored","worker":1,"tier":"gpu","blocks":[[1,2]]}"#, "unknown variant `gpu`"),
            (r#"{"op":"rank_removed","worker":1}"#, "the field `rank` is missing"),
            (r#"{"op":"expire","now":1,"now":2}"#, "duplicate field `now`"),
            (r#"{"op":"stats"} x"#, "trailing characters"),
            ("[1]", "line 3"),
            ("\u{fffd}", "line 3"),
        ] {
            let error = answers(&format!("{{\"op\":\"stats\"}}\n\n{bad}"), false, false).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.starts_with("line 3") && error.contains(why), "{bad}: {error}");
        }
    }
}
