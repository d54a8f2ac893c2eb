//! A message as it lies on the wire: one slice of the input, whose frames are found when they are looked at.
//!
//! A list of frames would cost an allocation for each message and a share of the input buffer for each frame; at a million
//! messages a second that was more than reading them from the socket.

use super::{FLAG_COMMAND, FLAG_LONG, MESSAGE_BYTES_MAX, MESSAGE_FRAMES_MAX, ZmtpError};
use bytes::Bytes;

/// A frame in front of some input.
pub(super) struct Frame<'a> {
    pub(super) flags: u8,
    pub(super) body: &'a [u8],
    /// Bytes that it takes, its head included.
    pub(super) len: usize,
}

/// What the input begins with.
pub(super) enum Front<'a> {
    /// A whole frame.
    Whole(Frame<'a>),
    /// The beginning of a frame; of so many bytes, where its head is there.
    Part(usize),
}

/// Looks at the front of `input`.
pub(super) fn front(input: &[u8]) -> Result<Front<'_>, ZmtpError> {
    let Some(&flags) = input.first() else { return Ok(Front::Part(0)) };
    let (head, body) = if flags & FLAG_LONG == 0 {
        let Some(&len) = input.get(1) else { return Ok(Front::Part(0)) };
        (2, usize::from(len))
    } else {
        let Some(len) = input.get(1..9) else { return Ok(Front::Part(0)) };
        let len = u64::from_be_bytes(len.try_into().expect("a slice of 8 bytes"));
        let len = usize::try_from(len).ok().filter(|len| *len <= MESSAGE_BYTES_MAX);
        (9, len.ok_or(ZmtpError::TooLarge)?)
    };
    let len = head + body;
    Ok(match input.get(head..len) {
        Some(body) => Front::Whole(Frame { flags, body, len }),
        None => Front::Part(len),
    })
}

/// One message, all its frames.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    /// Whole frames; a peer may have put commands between them.
    bytes: Bytes,
}

impl Message {
    /// `bytes` are whole frames.
    pub(super) const fn new(bytes: Bytes) -> Self {
        Self { bytes }
    }

    /// Bytes that it took on the wire.
    pub(crate) fn weight(&self) -> usize {
        self.bytes.len()
    }

    /// Its frames.
    pub(crate) fn frames(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest: &[u8] = &self.bytes;
        std::iter::from_fn(move || {
            loop {
                let Ok(Front::Whole(frame)) = front(rest) else { return None };
                rest = &rest[frame.len..];
                if frame.flags & FLAG_COMMAND == 0 {
                    return Some(frame.body);
                }
            }
        })
    }

    /// Its frames in an array's front, for those who want a slice.
    pub(crate) fn fill<'a>(&'a self, slots: &mut [&'a [u8]; MESSAGE_FRAMES_MAX]) -> usize {
        let mut count = 0;
        for (slot, frame) in slots.iter_mut().zip(self.frames()) {
            *slot = frame;
            count += 1;
        }
        count
    }

    /// Its frames, each sharing the message's memory.
    pub(crate) fn shared_frames(&self) -> Vec<Bytes> {
        self.frames().map(|frame| self.bytes.slice_ref(frame)).collect()
    }
}
