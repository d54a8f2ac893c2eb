//! TensorRT-LLM's buffered events: the JSON that `POST /kv_cache_events` drains.
//!
//! An array of `{"event_id", "data": {"type": "created" | "stored" | "removed" | "updated", ..}, "window_size",
//! "attention_dp_rank"?, "layer_group_id"?}`. Hashes are integers or strings; a block may be partial (fewer tokens than
//! others); a token id may be a string (a multimodal digest); `updated` moves a block between cache levels (0 device, 1 host,
//! further ones disk).
//!
//! [`crate::drain`] keeps the state that these events need.

use super::fields::hash_of_text;
use super::{BlockMedia, DropReason, EngineKind, Stored};
use kvlane_index::{EngineHash, GroupId, Tier};
use serde_json::Value;
use std::borrow::Cow;

/// One drained event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrainEvent {
    /// Number of the event in its rank, from 0 in each life of the engine.
    pub id: u64,
    /// The attention data-parallel rank; 0 where unsaid.
    pub rank: u32,
    /// The attention window of the layers that it is about, in tokens; `None` = unsaid.
    pub window: Option<u64>,
    /// The layer group; 0 where unsaid.
    pub group: GroupId,
    /// What happened, or why that is not used.
    pub data: Result<Drained, DropReason>,
}

/// What a drained event says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drained {
    /// The cache of a window was made: a life begins.
    Created,
    /// A chain of full blocks; `partial` names those that were not full.
    Stored {
        /// The full blocks in front, with [`Stored::block_size`] as told.
        stored: Stored<'static>,
        /// Names of blocks with fewer tokens.
        partial: Vec<EngineHash>,
    },
    /// Blocks left the cache, whatever level they were in.
    Removed(Vec<EngineHash>),
    /// A block moved between levels.
    Moved {
        /// The block.
        hash: EngineHash,
        /// Where it was.
        from: Tier,
        /// Where it is.
        to: Tier,
    },
    /// Nothing that matters here (a new priority).
    Nothing,
}

/// Decodes a drained body; `block_size` tells full blocks from partial ones.
///
/// An error means that the whole body is unusable, which is a loss: it was drained. An event without a number is a loss as
/// well; its reason stands in its place.
pub fn decode_drain(body: &[u8], block_size: u32) -> Result<Vec<Result<DrainEvent, DropReason>>, DropReason> {
    let body: Value = serde_json::from_slice(body).map_err(|_| DropReason::Malformed)?;
    let Value::Array(events) = body else { return Err(DropReason::NotABatch) };
    Ok(events.iter().map(|event| read_event(event, block_size)).collect())
}

fn read_event(event: &Value, block_size: u32) -> Result<DrainEvent, DropReason> {
    let id = event["event_id"].as_u64().ok_or(DropReason::BadField)?;
    let rank = event["attention_dp_rank"].as_u64().unwrap_or(0);
    let group = event["layer_group_id"].as_u64().unwrap_or(0);
    Ok(DrainEvent {
        id,
        rank: u32::try_from(rank).map_err(|_| DropReason::BadField)?,
        window: event["window_size"].as_u64(),
        group: GroupId(u16::try_from(group).map_err(|_| DropReason::BadField)?),
        data: read_data(&event["data"], block_size),
    })
}

fn read_data(data: &Value, block_size: u32) -> Result<Drained, DropReason> {
    match data["type"].as_str() {
        Some("created") => Ok(Drained::Created),
        Some("stored") => read_stored(data, block_size),
        Some("removed") => {
            let hashes = data["block_hashes"].as_array().ok_or(DropReason::BadRemoval)?;
            let hashes: Option<Vec<_>> = hashes.iter().map(read_hash).collect();
            hashes.map(Drained::Removed).ok_or(DropReason::BadRemoval)
        }
        Some("updated") => {
            let level = |name: &str| data["cache_level"][name].as_u64().map(tier_of_level);
            match (read_hash(&data["block_hash"]), level("old_value"), level("new_value")) {
                (Some(hash), Some(from), Some(to)) if from != to => Ok(Drained::Moved { hash, from, to }),
                (Some(_), ..) => Ok(Drained::Nothing),
                (None, ..) => Err(DropReason::BadField),
            }
        }
        _ => Err(DropReason::UnknownEvent),
    }
}

fn read_stored(data: &Value, block_size: u32) -> Result<Drained, DropReason> {
    let parent = match &data["parent_hash"] {
        Value::Null => None,
        hash => Some(read_hash(hash).ok_or(DropReason::BadField)?),
    };
    let blocks = data["blocks"].as_array().ok_or(DropReason::BadField)?;
    let mut stored = Stored {
        hashes: Vec::with_capacity(blocks.len()),
        parent,
        tokens: Vec::new(),
        block_size,
        tier: Tier::Device,
        group: GroupId(0),
        group_kind: None,
        adapter: None,
        salt: None,
        media: Vec::new(),
    };
    let mut partial = Vec::new();
    for (number, block) in (0..).zip(blocks) {
        let hash = read_hash(&block["block_hash"]).ok_or(DropReason::BadField)?;
        let tokens = block["tokens"].as_array().ok_or(DropReason::BadField)?;
        if tokens.len() != block_size as usize || !partial.is_empty() {
            partial.push(hash);
            continue;
        }
        if number == 0 {
            stored.tier = tier_of_level(block["cache_level"].as_u64().unwrap_or(0));
            stored.salt = text_of(&block["cache_salt"]).map(Cow::Owned);
            stored.adapter = text_of(&block["lora_id"]).map(|id| Cow::Owned(format!("lora-id:{id}")));
        }
        read_block(number, block, tokens, &mut stored)?;
        stored.hashes.push(hash);
    }
    Ok(Drained::Stored { stored, partial })
}

/// Tokens of one block, and what beside them makes its identity.
fn read_block(
    number: u32,
    block: &Value,
    tokens: &[Value],
    stored: &mut Stored<'static>,
) -> Result<(), DropReason> {
    let mut media = |offset: i64, identifier: String| {
        stored.media.push(BlockMedia { block: number, offset, identifier: Cow::Owned(identifier) });
    };
    for (at, token) in (0..).zip(tokens) {
        // Old versions print bare numbers.
        let id = if token.is_object() { &token["token_id"] } else { token };
        let token_id = match (id.as_u64(), id.as_str()) {
            (Some(id), _) => u32::try_from(id).map_err(|_| DropReason::BadField)?,
            (None, Some(digest)) => {
                media(at, digest.to_owned());
                0
            }
            (None, None) => return Err(DropReason::BadField),
        };
        stored.tokens.push(token_id);
        if let Some(extra) = token["token_extra_id"].as_u64().filter(|&extra| extra != 0) {
            media(at, format!("extra:{extra}"));
        }
    }
    for key in block["mm_keys"].as_array().map_or(&[][..], Vec::as_slice) {
        let identifier = text_of(&key["hash"]).ok_or(DropReason::BadField)?;
        media(key["start_offset"].as_i64().unwrap_or(0), identifier);
    }
    Ok(())
}

fn read_hash(value: &Value) -> Option<EngineHash> {
    match value {
        Value::Number(number) => {
            number.as_u64().or_else(|| number.as_i64().map(|v| v as u64)).map(EngineHash)
        }
        Value::String(text) => Some(hash_of_text(EngineKind::TrtLlm, text.as_bytes())),
        _ => None,
    }
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn tier_of_level(level: u64) -> Tier {
    match level {
        0 => Tier::Device,
        1 => Tier::Host,
        _ => Tier::Disk,
    }
}
