//! Cache events as the engines write them: msgpack batches and the frames around them.
//!
//! The counterpart of `kvlane-events`, for the mock engine, for fault tests and for benches: it writes what engines write,
//! byte for byte (`tests/wire.rs` compares with recordings), and shares no code with the decoder, so that a
//! misreading of the format cannot hide in both.
//!
//! A message is three frames: topic, sequence number (8 bytes, big-endian, from 0 in each life of a publisher) and a batch
//! `[timestamp in seconds, [event, ...], rank]`. Events are arrays (tag first, then fields by position) in vLLM up to 0.23
//! and SGLang up to 0.5.19, and maps (fields at their default left out) since.

use crate::CacheEvent;
use kvlane_index::{BlockSize, EngineHash, GroupKind, KvEvent, Tier};
use rmp::encode as mp;

/// How an engine of some version writes its events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// vLLM 0.24 and newer.
    VllmMap,
    /// vLLM up to 0.23: the tag and this many fields of a `BlockStored`, 5 (0.9) to 11 (0.22.1 and 0.23).
    VllmArray {
        /// Fields after the tag.
        stored_fields: u8,
    },
    /// SGLang 0.5.20 and newer.
    SglangMap,
}

impl Form {
    /// vLLM 0.23, the last with arrays.
    pub const VLLM_0_23: Self = Self::VllmArray { stored_fields: 11 };

    /// Whether removals are written one event for each block, as vLLM does, or one for all.
    const fn one_removal_each(self) -> bool {
        !matches!(self, Self::SglangMap)
    }
}

/// How a replay socket frames its replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplayForm {
    /// vLLM 0.26, SGLang 0.5.22 and newer: empty frame, topic, sequence, payload.
    WithTopic,
    /// Older ones: empty frame, sequence, payload.
    WithoutTopic,
}

/// Writes one batch of events, appended to `out`.
///
/// `rank` of `None` writes an array of two, as a struct with omitted defaults may. A `Stored` that came without content is
/// written with no tokens.
pub fn write_batch(
    form: Form,
    ts_s: f64,
    events: &[CacheEvent],
    rank: Option<u32>,
    block_size: BlockSize,
    out: &mut Vec<u8>,
) {
    array(out, if rank.is_some() { 3 } else { 2 });
    sure(mp::write_f64(out, ts_s));
    let count = events.iter().map(|event| wire_events(form, &event.event)).sum();
    array(out, count);
    for event in events {
        write_event(form, event, block_size, out);
    }
    if let Some(rank) = rank {
        uint(out, u64::from(rank));
    }
}

/// The three frames of a published message.
pub fn publish_frames(topic: &str, sequence: u64, payload: Vec<u8>) -> [Vec<u8>; 3] {
    [topic.as_bytes().to_vec(), sequence.to_be_bytes().to_vec(), payload]
}

/// The frames of one replayed message, as a DEALER receives them.
pub fn replay_frames(form: ReplayForm, topic: &str, sequence: u64, payload: Vec<u8>) -> Vec<Vec<u8>> {
    let mut frames = vec![Vec::new()];
    if form == ReplayForm::WithTopic {
        frames.push(topic.as_bytes().to_vec());
    }
    frames.push(sequence.to_be_bytes().to_vec());
    frames.push(payload);
    frames
}

/// The frames that end a replay: the sequence number 2^64 - 1 and an empty payload.
pub fn replay_end_frames(form: ReplayForm) -> Vec<Vec<u8>> {
    replay_frames(form, "", u64::MAX, Vec::new())
}

/// How many events on the wire an event becomes.
fn wire_events(form: Form, event: &KvEvent) -> usize {
    match event {
        KvEvent::Removed { hashes, .. } if form.one_removal_each() => hashes.len(),
        KvEvent::Stored { .. }
        | KvEvent::StoredByHash { .. }
        | KvEvent::Removed { .. }
        | KvEvent::Cleared { .. } => 1,
    }
}

fn write_event(form: Form, event: &CacheEvent, block_size: BlockSize, out: &mut Vec<u8>) {
    match &event.event {
        KvEvent::Cleared { .. } => match form {
            Form::VllmArray { .. } => {
                array(out, 1);
                text(out, "AllBlocksCleared");
            }
            Form::VllmMap | Form::SglangMap => {
                map(out, 1);
                entry(out, "type", "AllBlocksCleared");
            }
        },
        KvEvent::Removed { tier, group, hashes } if form.one_removal_each() => {
            for hash in hashes {
                write_removed(form, *tier, group.0, std::slice::from_ref(hash), out);
            }
        }
        KvEvent::Removed { tier, group, hashes } => write_removed(form, *tier, group.0, hashes, out),
        KvEvent::Stored { tier, group, parent, blocks } => {
            let hashes: Vec<EngineHash> = blocks.iter().map(|block| block.engine).collect();
            Stored::new(form, *tier, group.id.0, group.kind, *parent, &hashes, event, block_size).write(out);
        }
        KvEvent::StoredByHash { tier, group, hashes } => {
            Stored::new(form, *tier, group.id.0, group.kind, None, hashes, event, block_size).write(out);
        }
    }
}

fn write_removed(form: Form, tier: Tier, group: u16, hashes: &[EngineHash], out: &mut Vec<u8>) {
    match form {
        Form::VllmMap => {
            map(out, 4);
            entry(out, "type", "BlockRemoved");
            text(out, "block_hashes");
            write_hashes(form, hashes, out);
            entry(out, "medium", medium(form, tier));
            text(out, "group_idx");
            uint(out, u64::from(group));
        }
        Form::SglangMap => {
            map(out, 3);
            entry(out, "type", "BlockRemoved");
            text(out, "block_hashes");
            write_hashes(form, hashes, out);
            entry(out, "medium", medium(form, tier));
        }
        Form::VllmArray { stored_fields } => {
            // Medium and group came to removals with the versions that brought them to stores.
            let fields = 1 + usize::from(stored_fields >= 6) + usize::from(stored_fields >= 9);
            array(out, 1 + fields);
            text(out, "BlockRemoved");
            write_hashes(form, hashes, out);
            if fields >= 2 {
                text(out, medium(form, tier));
            }
            if fields >= 3 {
                uint(out, u64::from(group));
            }
        }
    }
}

/// The fields of a `BlockStored`.
struct Stored<'a> {
    form: Form,
    medium: &'static str,
    group: u16,
    kind: &'static str,
    window: Option<u32>,
    parent: Option<EngineHash>,
    hashes: &'a [EngineHash],
    tokens: &'a [u32],
    block_size: u32,
    adapter: Option<&'a (u32, String)>,
    /// Named for the first block of a prompt only.
    salt: Option<&'a str>,
}

impl<'a> Stored<'a> {
    #[expect(clippy::too_many_arguments, reason = "a projection of one event, called from one place")]
    fn new(
        form: Form,
        tier: Tier,
        group: u16,
        kind: GroupKind,
        parent: Option<EngineHash>,
        hashes: &'a [EngineHash],
        event: &'a CacheEvent,
        block_size: BlockSize,
    ) -> Self {
        let size = block_size.tokens() as usize;
        let (tokens, adapter, salt): (&[u32], _, _) = match &event.content {
            None => (&[], None, None),
            Some(stored) => {
                let first = stored.first_block as usize * size;
                let end = (first + hashes.len() * size).min(stored.content.tokens.len());
                let salt = stored.content.salt.as_deref().filter(|_| first == 0);
                (stored.content.tokens.get(first..end).unwrap_or(&[]), stored.content.adapter.as_ref(), salt)
            }
        };
        let (kind, window) = match kind {
            GroupKind::Full => ("full_attention", None),
            GroupKind::Sliding { window_tokens } => ("sliding_window", Some(window_tokens)),
            GroupKind::Recurrent => ("mamba", None),
        };
        Self {
            form,
            medium: medium(form, tier),
            group,
            kind,
            window,
            parent,
            hashes,
            tokens,
            block_size: if tokens.is_empty() && !hashes.is_empty() { 0 } else { block_size.tokens() },
            adapter,
            salt,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self.form {
            Form::VllmArray { stored_fields } => self.write_array(stored_fields, out),
            Form::VllmMap => {
                map(out, 11 + usize::from(self.window.is_some()));
                self.write_common(out);
                entry(out, "medium", self.medium);
                text(out, "lora_name");
                optional(out, self.adapter.map(|adapter| adapter.1.as_str()));
                text(out, "extra_keys");
                self.write_extra_keys(out);
                text(out, "group_idx");
                uint(out, u64::from(self.group));
                entry(out, "kv_cache_spec_kind", self.kind);
                if let Some(window) = self.window {
                    text(out, "kv_cache_spec_sliding_window");
                    uint(out, u64::from(window));
                }
            }
            Form::SglangMap => {
                map(out, 7 + usize::from(self.salt.is_some()) + usize::from(self.adapter.is_some()));
                self.write_common(out);
                entry(out, "medium", self.medium);
                if let Some(salt) = self.salt {
                    entry(out, "cache_salt", salt);
                }
                if let Some((_, name)) = self.adapter {
                    entry(out, "lora_name", name);
                }
            }
        }
    }

    /// The first six keys, which both map forms have in the same order.
    fn write_common(&self, out: &mut Vec<u8>) {
        entry(out, "type", "BlockStored");
        text(out, "block_hashes");
        write_hashes(self.form, self.hashes, out);
        text(out, "parent_block_hash");
        self.write_parent(out);
        text(out, "token_ids");
        self.write_tokens(out);
        text(out, "block_size");
        uint(out, u64::from(self.block_size));
        text(out, "lora_id");
        self.write_adapter_number(out);
    }

    fn write_array(&self, fields: u8, out: &mut Vec<u8>) {
        let fields = fields.clamp(5, 11);
        array(out, 1 + usize::from(fields));
        text(out, "BlockStored");
        write_hashes(self.form, self.hashes, out);
        self.write_parent(out);
        self.write_tokens(out);
        uint(out, u64::from(self.block_size));
        self.write_adapter_number(out);
        for field in 6..=fields {
            match field {
                6 => text(out, self.medium),
                7 => optional(out, self.adapter.map(|adapter| adapter.1.as_str())),
                8 => self.write_extra_keys(out),
                9 => uint(out, u64::from(self.group)),
                10 => text(out, self.kind),
                _ => match self.window {
                    Some(window) => uint(out, u64::from(window)),
                    None => nil(out),
                },
            }
        }
    }

    fn write_parent(&self, out: &mut Vec<u8>) {
        match self.parent {
            Some(parent) => write_hash(self.form, parent, out),
            None => nil(out),
        }
    }

    fn write_tokens(&self, out: &mut Vec<u8>) {
        array(out, self.tokens.len());
        for token in self.tokens {
            uint(out, u64::from(*token));
        }
    }

    fn write_adapter_number(&self, out: &mut Vec<u8>) {
        match (self.form, self.adapter) {
            (Form::VllmMap | Form::VllmArray { .. }, Some((number, _))) => uint(out, u64::from(*number)),
            (Form::SglangMap, _) | (_, None) => nil(out),
        }
    }

    /// For each block: the adapter's name, then in a prompt's first block the salt; nil where there is neither.
    fn write_extra_keys(&self, out: &mut Vec<u8>) {
        array(out, self.hashes.len());
        for i in 0..self.hashes.len() {
            let salt = self.salt.filter(|_| i == 0);
            let keys = usize::from(self.adapter.is_some()) + usize::from(salt.is_some());
            if keys == 0 {
                nil(out);
                continue;
            }
            array(out, keys);
            if let Some((_, name)) = self.adapter {
                text(out, name);
            }
            if let Some(salt) = salt {
                text(out, salt);
            }
        }
    }
}

fn medium(form: Form, tier: Tier) -> &'static str {
    match (tier, form) {
        (Tier::Device, _) => "GPU",
        (Tier::Host, Form::SglangMap) => "CPU_PINNED",
        (Tier::Host, _) => "CPU",
        (Tier::Disk, Form::SglangMap) => "DISK",
        (Tier::Disk, _) => "STORAGE",
        (Tier::External, Form::SglangMap) => "EXTERNAL",
        (Tier::External, _) => "OBJ",
    }
}

fn write_hashes(form: Form, hashes: &[EngineHash], out: &mut Vec<u8>) {
    array(out, hashes.len());
    for hash in hashes {
        write_hash(form, *hash, out);
    }
}

fn write_hash(form: Form, hash: EngineHash, out: &mut Vec<u8>) {
    match form {
        Form::VllmMap | Form::VllmArray { .. } => uint(out, hash.0),
        Form::SglangMap => {
            sure(mp::write_sint(out, hash.0.cast_signed()));
        }
    }
}

fn entry(out: &mut Vec<u8>, key: &str, value: &str) {
    text(out, key);
    text(out, value);
}

fn optional(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        Some(value) => text(out, value),
        None => nil(out),
    }
}

fn array(out: &mut Vec<u8>, len: usize) {
    sure(mp::write_array_len(out, len as u32));
}

fn map(out: &mut Vec<u8>, len: usize) {
    sure(mp::write_map_len(out, len as u32));
}

fn text(out: &mut Vec<u8>, value: &str) {
    sure(mp::write_str(out, value));
}

fn uint(out: &mut Vec<u8>, value: u64) {
    sure(mp::write_uint(out, value));
}

fn nil(out: &mut Vec<u8>) {
    sure(mp::write_nil(out));
}

/// A vector grows as long as there is memory; it refuses no write.
fn sure<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.expect("a Vec takes every write")
}
