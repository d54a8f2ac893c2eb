//! vLLM, 0.9 to 0.32, and what speaks through its publisher (LMCache).
//!
//! | since | change of `BlockStored` |
//! |---|---|
//! | 0.9 | array `[tag, block_hashes, parent, token_ids, block_size, lora_id]`; hashes are Python `hash()`, signed |
//! | 0.10.2 | `medium`, also in `BlockRemoved`; hashes are the last 8 bytes of a digest, or the digest (bin) |
//! | 0.14 | `lora_name` |
//! | 0.17 | `extra_keys`, one list for each block; media as bare identifiers |
//! | 0.19 | media as `[identifier, offset]` |
//! | 0.20 | `group_idx`, also in `BlockRemoved` |
//! | 0.22.1 | `kv_cache_spec_kind`, `kv_cache_spec_sliding_window` |
//! | 0.24 | maps instead of arrays |
//! | 0.26 | `locality`; replay messages carry the topic |
//! | 0.29 | `ownership` (unused here) |
//! | 0.30 | `session_id` (unused here) |
//!
//! `extra_keys[i]` lists, in this order: the adapter's name (every block), media, the cache salt (first block of a prompt
//! only), digests of prompt embeddings. The strings are nameless: with `lora_name` set the first is the adapter; of what is
//! left, a string in the first block of a prompt is the salt unless it looks like a media identifier (64 hexadecimal
//! digits, which is what vLLM 0.17 and 0.18 print there), and elsewhere it is a media identifier of unknown offset.

use super::BlockMedia;
use super::fields::{ExtraKey, Fields, Identity};
use std::borrow::Cow;

pub(super) fn identity<'a>(fields: &Fields<'a>) -> Identity<'a> {
    let adapter = match (fields.lora_name, fields.lora_id) {
        (Some(name), _) => Some(Cow::Borrowed(name)),
        // Before 0.14 an adapter has a number only. No request can name it so; it must not pass for the base model.
        (None, Some(id)) => Some(Cow::Owned(format!("lora-id:{id}"))),
        (None, None) => None,
    };
    let mut identity = Identity { adapter, salt: fields.cache_salt.map(Cow::Borrowed), media: Vec::new() };
    let mut adapter_seen_in = None;
    for (block, key) in &fields.extra_keys {
        let (offset, identifier) = match key {
            ExtraKey::Text(name) if fields.lora_name == Some(name) && adapter_seen_in != Some(*block) => {
                adapter_seen_in = Some(*block);
                continue;
            }
            ExtraKey::Salt(salt) => {
                identity.salt = Some(Cow::Borrowed(salt));
                continue;
            }
            ExtraKey::Text(salt) if *block == 0 && fields.at_root() && !is_identifier(salt) => {
                identity.salt = Some(Cow::Borrowed(salt));
                continue;
            }
            ExtraKey::Text(identifier) => (0, Cow::Borrowed(*identifier)),
            ExtraKey::Item(identifier, offset) => (*offset, Cow::Borrowed(*identifier)),
            ExtraKey::Opaque(bytes) => {
                (0, Cow::Owned(format!("opaque:{:016x}", xxhash_rust::xxh3::xxh3_64(bytes))))
            }
        };
        identity.media.push(BlockMedia { block: *block, offset, identifier });
    }
    identity
}

fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}
