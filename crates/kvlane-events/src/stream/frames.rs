//! ZMQ frames of the publish and the replay socket.
//!
//! A published message is topic, sequence number, payload. A replay message, as a DEALER sees it, is `["", seq, payload]` (vLLM
//! up to 0.25, SGLang up to 0.5.21) or `["", topic, seq, payload]` (later ones and TensorRT-LLM); some libraries strip the
//! empty delimiter. So replay messages are read from the right. The end marker is an empty payload under sequence 2^64-1.

use crate::wire::DropReason;

/// One published batch, undecoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Message<'a> {
    pub(super) seq: u64,
    pub(super) payload: &'a [u8],
}

/// A message of the replay socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reply<'a> {
    Batch(Message<'a>),
    End,
}

/// Reads a published message. SUB filters match prefixes, so the whole topic is compared here.
pub(super) fn live<'a>(frames: &[&'a [u8]], topic: Option<&[u8]>) -> Result<Message<'a>, DropReason> {
    let &[name, seq, payload] = frames else { return Err(DropReason::BadFrames) };
    if topic.is_some_and(|topic| topic != name) {
        return Err(DropReason::OtherTopic);
    }
    Ok(Message { seq: sequence(seq)?, payload })
}

/// Reads a replay message.
pub(super) fn reply<'a>(frames: &[&'a [u8]], topic: Option<&[u8]>) -> Result<Reply<'a>, DropReason> {
    let [before @ .., seq, payload] = frames else { return Err(DropReason::BadFrames) };
    if before.len() > 2 {
        return Err(DropReason::BadFrames);
    }
    let seq = sequence(seq)?;
    if payload.is_empty() && seq == u64::MAX {
        return Ok(Reply::End);
    }
    // Delimiter, topic: a topic is there only if there are two frames, or if the one frame is not empty.
    let named = before.last().filter(|frame| before.len() == 2 || !frame.is_empty());
    if let (Some(name), Some(topic)) = (named, topic)
        && *name != topic
    {
        return Err(DropReason::OtherTopic);
    }
    Ok(Reply::Batch(Message { seq, payload }))
}

fn sequence(frame: &[u8]) -> Result<u64, DropReason> {
    frame.try_into().map(u64::from_be_bytes).map_err(|_| DropReason::BadFrames)
}
