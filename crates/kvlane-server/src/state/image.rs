//! What one rank was known to hold at one place of its stream, as bytes: for the disk and for other processes.
//!
//! A picture of the cache alone would be worth nothing: by the time it is read the engine has moved on. Therefore it carries the
//! [`Position`] in the stream up to which it is complete, and it is used only where the stream proves that it goes on there
//! ([`kvlane_events::stream`]).
//!
//! Layout of a frame, numbers little-endian: length of the header (u32), the header (JSON), length of the events (u64), the events
//! ([`kvlane_index::snapshot::write_events`]), XXH3-64 of header and events (u64). A file or a stream of images is [`MAGIC`], frames, and a header
//! of length 0 as the end, so that a cut at any place is noticed.

use kvlane_events::stream::Position;
use kvlane_index::{KvEvent, snapshot};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use xxhash_rust::xxh3::Xxh3;

/// How a stream of images begins: name and version.
pub(crate) const MAGIC: &[u8; 8] = b"KVLIMG\x00\x01";

/// Longest header, in bytes.
const HEADER_BYTES_MAX: u32 = 1 << 20;
/// Most bytes of one rank's events: about 250 million blocks.
const EVENTS_BYTES_MAX: u64 = 4 << 30;

/// Which stream an image belongs to: equal only where the same publisher's blocks are hashed and cut alike.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The publisher's PUB socket as `tcp://host:port`.
    pub(crate) endpoint: String,
    pub(crate) rank: u32,
    pub(crate) model: String,
    pub(crate) group: String,
    /// Tokens in a block.
    pub(crate) block_size: u32,
    /// Number of the hash scheme.
    pub(crate) scheme: u32,
}

/// What is said about an image before its events.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) origin: Origin,
    /// The number of the instance in the process that took it.
    pub(crate) instance: u64,
    /// The publisher's ROUTER socket.
    pub(crate) replay: Option<String>,
    /// Up to where the stream was applied; absent: the publisher was followed, and not in step.
    pub(crate) position: Option<Mark>,
    /// When it was taken, in seconds since the Unix epoch.
    pub(crate) taken_unix_s: f64,
}

/// A [`Position`] as JSON.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Mark {
    next_seq: u64,
    since_seq: Option<u64>,
    complete: bool,
    /// Fingerprints of the batches before `next_seq`, the oldest first.
    recent: Vec<u64>,
    first_ts_s: Option<f64>,
    last_ts_s: Option<f64>,
    process_start_s: Option<f64>,
}

/// An image; its events are decoded when they are needed.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Image {
    pub(crate) header: Header,
    events: Vec<u8>,
}

/// Why bytes are no image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is no image of this version: it is ignored")]
    Magic,
    #[error("it is cut short or was changed: it is ignored")]
    Corrupt,
}

impl Image {
    pub(crate) fn new(header: Header, events: &[KvEvent]) -> Self {
        let mut bytes = Vec::new();
        snapshot::write_events(events, &mut bytes);
        Self { header, events: bytes }
    }

    /// What the rank held, as events for an empty one.
    pub(crate) fn events(&self) -> Result<Vec<KvEvent>, ImageError> {
        snapshot::read_events(&self.events).map_err(|_| ImageError::Corrupt)
    }

    /// Where the stream goes on.
    pub(crate) fn position(&self) -> Option<Position> {
        self.header.position.as_ref().map(Position::from)
    }

    /// Bytes of its events.
    pub(crate) fn bytes(&self) -> usize {
        self.events.len()
    }

    /// Writes one frame.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let header = serde_json::to_vec(&self.header)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        out.write_all(&length.to_le_bytes())?;
        out.write_all(&header)?;
        out.write_all(&(self.events.len() as u64).to_le_bytes())?;
        out.write_all(&self.events)?;
        out.write_all(&sum(&header, &self.events).to_le_bytes())
    }

    /// Reads one frame; `None` at the end mark.
    pub(crate) fn read(input: &mut impl Read) -> Result<Option<Self>, ImageError> {
        let length = u32::from_le_bytes(take(input)?);
        if length == 0 {
            return Ok(None);
        }
        if length > HEADER_BYTES_MAX {
            return Err(ImageError::Corrupt);
        }
        let header = bytes(input, u64::from(length))?;
        let length = u64::from_le_bytes(take(input)?);
        if length > EVENTS_BYTES_MAX {
            return Err(ImageError::Corrupt);
        }
        let events = bytes(input, length)?;
        if u64::from_le_bytes(take(input)?) != sum(&header, &events) {
            return Err(ImageError::Corrupt);
        }
        let header = serde_json::from_slice(&header).map_err(|_| ImageError::Corrupt)?;
        Ok(Some(Self { header, events }))
    }
}

/// Ends a stream of images.
pub(crate) fn write_end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&0u32.to_le_bytes())
}

/// Reads a whole stream of images.
pub(crate) fn read_all(input: &mut impl Read) -> Result<Vec<Image>, ImageError> {
    if take::<8>(input)? != *MAGIC {
        return Err(ImageError::Magic);
    }
    let mut images = Vec::new();
    while let Some(image) = Image::read(input)? {
        images.push(image);
    }
    Ok(images)
}

fn sum(header: &[u8], events: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(header);
    hasher.update(events);
    hasher.digest()
}

fn take<const N: usize>(input: &mut impl Read) -> Result<[u8; N], ImageError> {
    let mut out = [0; N];
    match input.read_exact(&mut out) {
        Ok(()) => Ok(out),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ImageError::Corrupt),
        Err(error) => Err(error.into()),
    }
}

/// Reads so many bytes; an announced length alone allocates nothing.
fn bytes(input: &mut impl Read, length: u64) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    input.take(length).read_to_end(&mut out)?;
    if out.len() as u64 == length { Ok(out) } else { Err(ImageError::Corrupt) }
}

impl From<&Position> for Mark {
    fn from(position: &Position) -> Self {
        let Position { next_seq, since_seq, complete, recent, first_ts_s, last_ts_s, process_start_s } =
            position;
        Self {
            next_seq: *next_seq,
            since_seq: *since_seq,
            complete: *complete,
            recent: recent.clone(),
            first_ts_s: *first_ts_s,
            last_ts_s: *last_ts_s,
            process_start_s: *process_start_s,
        }
    }
}

impl From<&Mark> for Position {
    fn from(mark: &Mark) -> Self {
        let Mark { next_seq, since_seq, complete, recent, first_ts_s, last_ts_s, process_start_s } = mark;
        Self {
            next_seq: *next_seq,
            since_seq: *since_seq,
            complete: *complete,
            recent: recent.clone(),
            first_ts_s: *first_ts_s,
            last_ts_s: *last_ts_s,
            process_start_s: *process_start_s,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use kvlane_index::{BlockHash, EngineHash, Group, StoredBlock, Tier};

    pub(in crate::state) fn sample(rank: u32) -> Image {
        let blocks = (0..5).map(|i| StoredBlock { engine: EngineHash(i), block: BlockHash(i * i) }).collect();
        let stored = KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks };
        let origin = Origin {
            endpoint: "tcp://h:5557".to_owned(),
            rank,
            model: "m".to_owned(),
            group: "default".to_owned(),
            block_size: 16,
            scheme: 2,
        };
        let position = Mark {
            next_seq: u64::MAX,
            since_seq: Some(0),
            complete: true,
            recent: vec![1, u64::MAX],
            first_ts_s: Some(1.5),
            last_ts_s: Some(1_790_000_000.123_456_7),
            process_start_s: None,
        };
        let header =
            Header { origin, instance: 7, replay: None, position: Some(position), taken_unix_s: 2.5 };
        Image::new(header, &[stored])
    }

    #[test]
    fn images_survive_the_way_and_every_cut_or_changed_byte_is_noticed() {
        let images = [sample(0), sample(1)];
        let mut good = MAGIC.to_vec();
        images.iter().for_each(|image| image.write(&mut good).unwrap());
        write_end(&mut good).unwrap();
        let read = read_all(&mut &good[..]).unwrap();
        assert_eq!(read, images);
        assert_eq!(read[0].events().unwrap().len(), 1);
        for at in 0..good.len() {
            assert!(read_all(&mut &good[..at]).is_err(), "cut at {at}");
            let mut changed = good.clone();
            changed[at] ^= 0x40;
            assert!(read_all(&mut &changed[..]).is_err(), "changed at {at}");
        }
    }
}
