//! One operation on a partition, and how it is written for `kvlane index run`.

use kvlane_index::{BlockHash, EngineHash, Group, GroupKind, KvEvent, StoredBlock, Worker};

/// One operation on a partition.
#[derive(Clone, PartialEq, Debug)]
pub enum Op {
    Event(Worker, KvEvent),
    RemoveWorker(Worker),
    RemoveInstance(u64),
    Predict(Worker, Vec<BlockHash>, u64),
    Expire(u64),
    ForgetPredictions(Worker),
    Query(Vec<BlockHash>),
    /// The partition goes through a snapshot into a fresh one with another prefix key.
    Restart(u64),
    /// Keeps what a rank holds.
    Save(Worker),
    /// Gives a rank what was kept of this one; nothing, if nothing was kept.
    Replace(Worker, Worker),
    /// Compares all figures and everything that is held.
    Check,
}

fn numbers(out: &mut String, all: impl Iterator<Item = u64>) {
    out.push('[');
    for (at, number) in all.enumerate() {
        if at > 0 {
            out.push(',');
        }
        out.push_str(&number.to_string());
    }
    out.push(']');
}

fn place(worker: Worker, tier: kvlane_index::Tier, group: Group) -> String {
    let kind = match group.kind {
        GroupKind::Full => String::new(),
        GroupKind::Sliding { window_tokens } => {
            format!(r#","kind":"sliding","window_tokens":{window_tokens}"#)
        }
        GroupKind::Recurrent => r#","kind":"recurrent""#.into(),
    };
    format!(
        r#""worker":{},"rank":{},"tier":"{}","group":{}{kind}"#,
        worker.instance.0,
        worker.rank,
        tier.name(),
        group.id.0
    )
}

impl Op {
    /// The line for `kvlane index run`; what it does not know is a comment line starting with `#`.
    pub fn line(&self) -> String {
        let mut out = String::new();
        match self {
            Self::Event(worker, KvEvent::Stored { tier, group, parent, blocks }) => {
                let parent = parent.map_or("null".into(), |p| p.0.to_string());
                out += &format!(
                    r#"{{"op":"stored",{},"parent":{parent},"blocks":["#,
                    place(*worker, *tier, *group)
                );
                for (at, StoredBlock { engine, block }) in blocks.iter().enumerate() {
                    let separator = if at > 0 { "," } else { "" };
                    out += &format!("{separator}[{},{}]", engine.0, block.0);
                }
                out += "]}";
            }
            Self::Event(worker, KvEvent::StoredByHash { tier, group, hashes }) => {
                out += &format!(r#"{{"op":"stored_by_hash",{},"hashes":"#, place(*worker, *tier, *group));
                numbers(&mut out, hashes.iter().map(|EngineHash(hash)| *hash));
                out.push('}');
            }
            Self::Event(worker, KvEvent::Removed { tier, group, hashes }) => {
                let group = Group { id: *group, ..Group::default() };
                out += &format!(r#"{{"op":"removed",{},"hashes":"#, place(*worker, *tier, group));
                numbers(&mut out, hashes.iter().map(|EngineHash(hash)| *hash));
                out.push('}');
            }
            Self::Event(worker, KvEvent::Cleared { tier }) => {
                let tier = tier.map_or(String::new(), |tier| format!(r#","tier":"{}""#, tier.name()));
                out += &format!(
                    r#"{{"op":"cleared","worker":{},"rank":{}{tier}}}"#,
                    worker.instance.0, worker.rank
                );
            }
            Self::RemoveWorker(worker) => {
                out += &format!(
                    r#"{{"op":"rank_removed","worker":{},"rank":{}}}"#,
                    worker.instance.0, worker.rank
                );
            }
            Self::RemoveInstance(instance) => {
                out += &format!(r#"{{"op":"worker_removed","worker":{instance}}}"#);
            }
            Self::Predict(worker, blocks, until) => {
                out += &format!(
                    r#"{{"op":"predicted","worker":{},"rank":{},"blocks":"#,
                    worker.instance.0, worker.rank
                );
                numbers(&mut out, blocks.iter().map(|BlockHash(hash)| *hash));
                out += &format!(r#","until":{until}}}"#);
            }
            Self::Expire(now) => out += &format!(r#"{{"op":"expire","now":{now}}}"#),
            Self::Query(prompt) => {
                out += r#"{"op":"query","blocks":"#;
                numbers(&mut out, prompt.iter().map(|BlockHash(hash)| *hash));
                out.push('}');
            }
            Self::Check => out += r#"{"op":"stats"}"#,
            Self::ForgetPredictions(_) | Self::Restart(_) | Self::Save(_) | Self::Replace(..) => {
                out += &format!("# {self:?}");
            }
        }
        out
    }
}
