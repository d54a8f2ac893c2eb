//! A partition's content as bytes: to survive a restart of the router, or to fill another one.
//!
//! Holds what [`Index::dump`](crate::Index::dump) says of each worker, so neither predictions nor orphans. Block hashes travel, prefix
//! hashes do not (their key is the process's own); therefore the format names the hashing scheme and the block size, and a
//! snapshot of another one is refused.
//!
//! Layout, all numbers little-endian: the magic `KVLSNAP`, format version (u8), scheme (u32), tokens in a block (u32), count of workers (u64); for each
//! worker: instance (u64), rank (u32), count of events (u64), the events; at the end XXH3-64 of all bytes before (u64). An event
//! is a kind (u8), tier (u8), group (u16), kind of the group (u8), window in tokens (u32), then, for stored (0): 1 and the parent (u64), or 0 (u8); count
//! (u64); engine and block hash of each. For stored by hash (1) and removed (2): count (u64); engine hashes.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    BlockHash, BlockSize, EngineHash, Group, GroupId, GroupKind, Index, IndexWriter, KvEvent, StoredBlock,
    Tier, Worker,
};

const MAGIC: &[u8; 7] = b"KVLSNAP";
const FORMAT: u8 = 1;
/// XXH3-64 with seed 1337 over a block's tokens; see [`hash`](crate::hash).
const SCHEME: u32 = 1;

/// Why a snapshot was not taken. The index is as it was before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SnapshotError {
    /// Not a snapshot at all.
    NotASnapshot,
    /// Made by another version of this crate: start without it.
    Format {
        /// The format's version in the file.
        found: u8,
    },
    /// Blocks are hashed in another way there: start without it.
    Scheme {
        /// The scheme's number in the file.
        found: u32,
    },
    /// Its workers have another block size: it belongs to another partition.
    BlockSize {
        /// Tokens in a block, in the file.
        found: u32,
    },
    /// The bytes end too early or were changed: start without it.
    Corrupt,
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASnapshot => write!(f, "this is no index snapshot"),
            Self::Format { found } => write!(f, "snapshot format {found} is not {FORMAT}: start without it"),
            Self::Scheme { found } => {
                write!(f, "block hash scheme {found} is not {SCHEME}: start without it")
            }
            Self::BlockSize { found } => {
                write!(f, "the snapshot's blocks have {found} tokens: another partition's")
            }
            Self::Corrupt => write!(f, "the snapshot is cut short or was changed: start without it"),
        }
    }
}

impl std::error::Error for SnapshotError {}

/// Writes what all workers of a partition hold. Each worker is written as it is at one moment.
pub fn write(index: &Index) -> Vec<u8> {
    let mut workers: Vec<Worker> = index.workers().into_iter().map(|held| held.worker).collect();
    workers.dedup();
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.push(FORMAT);
    out.extend_from_slice(&SCHEME.to_le_bytes());
    out.extend_from_slice(&index.block_size().tokens().to_le_bytes());
    out.extend_from_slice(&(workers.len() as u64).to_le_bytes());
    for worker in workers {
        let events = index.dump(worker);
        out.extend_from_slice(&worker.instance.0.to_le_bytes());
        out.extend_from_slice(&worker.rank.to_le_bytes());
        out.extend_from_slice(&(events.len() as u64).to_le_bytes());
        for event in &events {
            write_event(event, &mut out);
        }
    }
    out.extend_from_slice(&xxh3_64(&out).to_le_bytes());
    out
}

/// Appends a worker's [`dump`](crate::Index::dump) to `out`, in the layout of a snapshot's events, without their count. For whoever
/// keeps one worker's content apart from the others', with a frame and a checksum of their own.
pub fn write_events(events: &[KvEvent], out: &mut Vec<u8>) {
    for event in events {
        write_event(event, out);
    }
}

/// Reads back what [`write_events`] wrote; the bytes must end with an event.
pub fn read_events(bytes: &[u8]) -> Result<Vec<KvEvent>, SnapshotError> {
    let mut reader = Reader(bytes);
    let mut events = Vec::new();
    while !reader.0.is_empty() {
        events.push(reader.event()?);
    }
    Ok(events)
}

fn write_event(event: &KvEvent, out: &mut Vec<u8>) {
    let mut head = |event: u8, tier: Tier, id: GroupId, kind: GroupKind| {
        let (kind, window) = match kind {
            GroupKind::Full => (0, 0),
            GroupKind::Sliding { window_tokens } => (1, window_tokens),
            GroupKind::Recurrent => (2, 0),
        };
        out.extend_from_slice(&[event, tier as u8]);
        out.extend_from_slice(&id.0.to_le_bytes());
        out.push(kind);
        out.extend_from_slice(&u32::to_le_bytes(window));
    };
    let hashes = match event {
        KvEvent::Stored { tier, group, parent, blocks } => {
            head(0, *tier, group.id, group.kind);
            match parent {
                Some(parent) => {
                    out.push(1);
                    out.extend_from_slice(&parent.0.to_le_bytes());
                }
                None => out.push(0),
            }
            out.extend_from_slice(&(blocks.len() as u64).to_le_bytes());
            for StoredBlock { engine, block } in blocks {
                out.extend_from_slice(&engine.0.to_le_bytes());
                out.extend_from_slice(&block.0.to_le_bytes());
            }
            return;
        }
        KvEvent::StoredByHash { tier, group, hashes } => {
            head(1, *tier, group.id, group.kind);
            hashes
        }
        KvEvent::Removed { tier, group, hashes } => {
            head(2, *tier, *group, GroupKind::Full);
            hashes
        }
        // A dump says what is there, so it clears nothing.
        KvEvent::Cleared { .. } => return,
    };
    out.extend_from_slice(&(hashes.len() as u64).to_le_bytes());
    for hash in hashes {
        out.extend_from_slice(&hash.0.to_le_bytes());
    }
}

/// Adds a snapshot's content to a partition, worker by worker; a worker that is in it is cleared first.
///
/// The bytes are checked as a whole before anything is changed. Returns how many blocks were stored.
pub fn restore(bytes: &[u8], index: &Index, writer: &mut IndexWriter) -> Result<u64, SnapshotError> {
    let workers = read(bytes, index.block_size())?;
    let mut stored = 0;
    for (worker, events) in &workers {
        let _ = writer.apply(*worker, &KvEvent::Cleared { tier: None });
        for event in events {
            stored += u64::from(writer.apply(*worker, event).stored);
        }
    }
    Ok(stored)
}

/// What a worker holds, as events for an empty index.
type Content = (Worker, Vec<KvEvent>);

fn read(bytes: &[u8], block_size: BlockSize) -> Result<Vec<Content>, SnapshotError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(SnapshotError::NotASnapshot)?;
    let (&format, rest) = rest.split_first().ok_or(SnapshotError::Corrupt)?;
    if format != FORMAT {
        return Err(SnapshotError::Format { found: format });
    }
    let split = rest.len().checked_sub(8).ok_or(SnapshotError::Corrupt)?;
    let (body, sum) = rest.split_at(split);
    if xxh3_64(&bytes[..bytes.len() - 8]).to_le_bytes() != sum {
        return Err(SnapshotError::Corrupt);
    }
    let mut reader = Reader(body);
    let scheme = reader.u32()?;
    if scheme != SCHEME {
        return Err(SnapshotError::Scheme { found: scheme });
    }
    let tokens = reader.u32()?;
    if tokens != block_size.tokens() {
        return Err(SnapshotError::BlockSize { found: tokens });
    }
    let mut workers = Vec::new();
    for _ in 0..reader.u64()? {
        let instance = reader.u64()?;
        let worker = Worker::new(instance, reader.u32()?);
        let mut events = Vec::new();
        for _ in 0..reader.u64()? {
            events.push(reader.event()?);
        }
        workers.push((worker, events));
    }
    if reader.0.is_empty() { Ok(workers) } else { Err(SnapshotError::Corrupt) }
}

/// The bytes not read yet.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], SnapshotError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(SnapshotError::Corrupt)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, SnapshotError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, SnapshotError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, SnapshotError> {
        self.take().map(u64::from_le_bytes)
    }

    /// A count of items of at least `bytes` bytes each, which must be there.
    fn count(&mut self, bytes: u64) -> Result<u64, SnapshotError> {
        let count = self.u64()?;
        if count <= self.0.len() as u64 / bytes { Ok(count) } else { Err(SnapshotError::Corrupt) }
    }

    fn hashes(&mut self) -> Result<Vec<EngineHash>, SnapshotError> {
        (0..self.count(8)?).map(|_| self.u64().map(EngineHash)).collect()
    }

    fn event(&mut self) -> Result<KvEvent, SnapshotError> {
        let event = self.u8()?;
        let tier = *Tier::ALL.get(usize::from(self.u8()?)).ok_or(SnapshotError::Corrupt)?;
        let id = GroupId(u16::from_le_bytes(self.take()?));
        let (kind, window_tokens) = (self.u8()?, self.u32()?);
        let kind = match kind {
            0 => GroupKind::Full,
            1 => GroupKind::Sliding { window_tokens },
            2 => GroupKind::Recurrent,
            _ => return Err(SnapshotError::Corrupt),
        };
        let group = Group { id, kind };
        Ok(match event {
            0 => {
                let parent = match self.u8()? {
                    0 => None,
                    1 => Some(EngineHash(self.u64()?)),
                    _ => return Err(SnapshotError::Corrupt),
                };
                let mut blocks = Vec::new();
                for _ in 0..self.count(16)? {
                    let engine = EngineHash(self.u64()?);
                    blocks.push(StoredBlock { engine, block: BlockHash(self.u64()?) });
                }
                KvEvent::Stored { tier, group, parent, blocks }
            }
            1 => KvEvent::StoredByHash { tier, group, hashes: self.hashes()? },
            2 => KvEvent::Removed { tier, group: id, hashes: self.hashes()? },
            _ => return Err(SnapshotError::Corrupt),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IndexConfig, Overlaps, partition};

    fn size(tokens: u32) -> BlockSize {
        BlockSize::new(tokens).unwrap()
    }

    fn sample() -> Vec<u8> {
        let (mut writer, index) = partition(IndexConfig::new(size(16)));
        let blocks = |from: u64| {
            (from..from + 3)
                .map(|i| StoredBlock { engine: EngineHash(100 + i), block: BlockHash(i) })
                .collect()
        };
        let group = Group::default();
        let (w, v) = (Worker::new(1, 0), Worker::new(1, 3));
        let _ =
            writer.apply(w, &KvEvent::Stored { tier: Tier::Device, group, parent: None, blocks: blocks(0) });
        let parent = Some(EngineHash(102));
        let _ = writer.apply(w, &KvEvent::Stored { tier: Tier::Disk, group, parent, blocks: blocks(3) });
        let _ =
            writer.apply(v, &KvEvent::Stored { tier: Tier::Device, group, parent: None, blocks: blocks(0) });
        let hashes = vec![EngineHash(100)];
        let _ = writer.apply(v, &KvEvent::Removed { tier: Tier::Device, group: group.id, hashes });
        write(&index)
    }

    #[test]
    fn a_restored_index_answers_as_before() {
        let mut config = IndexConfig::new(size(16));
        config.prefix_key = 99;
        let (mut writer, index) = partition(config);
        restore(&sample(), &index, &mut writer).unwrap();
        let mut overlaps = Overlaps::default();
        let prompt: Vec<BlockHash> = (0..6).map(BlockHash).collect();
        index.overlap(&prompt, &mut overlaps);
        let all = overlaps.get(Worker::new(1, 0)).unwrap();
        assert_eq!((all.device, all.disk), (3, 3));
        assert_eq!(overlaps.get(Worker::new(1, 3)), None, "its first block is a hole");
        assert_eq!(write(&index), sample());
    }

    #[test]
    fn one_workers_events_travel_alone() {
        let events = read(&sample(), size(16)).unwrap().remove(0).1;
        let mut bytes = Vec::new();
        write_events(&events, &mut bytes);
        assert_eq!(read_events(&bytes).unwrap(), events);
        assert_eq!(read_events(&bytes[..bytes.len() - 1]), Err(SnapshotError::Corrupt));
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_refused_and_leaves_the_index_working() {
        let (mut writer, index) = partition(IndexConfig::new(size(16)));
        let good = sample();
        for end in 0..good.len() {
            assert!(restore(&good[..end], &index, &mut writer).is_err(), "cut at {end}");
            let mut changed = good.clone();
            changed[end] ^= 0x40;
            assert!(restore(&changed, &index, &mut writer).is_err(), "changed at {end}");
        }
        assert_eq!(index.stats().pairs, 0);
        assert!(restore(&good, &index, &mut writer).is_ok());
    }

    #[test]
    fn a_snapshot_of_another_partition_is_refused_by_name() {
        let (mut writer, index) = partition(IndexConfig::new(size(32)));
        assert_eq!(restore(&sample(), &index, &mut writer), Err(SnapshotError::BlockSize { found: 16 }));
        assert_eq!(restore(b"hello", &index, &mut writer), Err(SnapshotError::NotASnapshot));
        let mut newer = sample();
        newer[7] = 9;
        assert_eq!(restore(&newer, &index, &mut writer), Err(SnapshotError::Format { found: 9 }));
    }
}
