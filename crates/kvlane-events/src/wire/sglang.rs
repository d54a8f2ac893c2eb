//! SGLang, 0.4.7 to 0.5.23.
//!
//! | since | change of `BlockStored` |
//! |---|---|
//! | 0.4.7 | array `[tag, block_hashes, parent, token_ids, block_size, lora_id]`; hashes are Python `hash()` of the page alone |
//! | 0.5.7 | hashes are the first 8 bytes of a chained SHA-256, signed |
//! | 0.5.9 | `medium`, also in `BlockRemoved` |
//! | 0.5.20 | maps instead of arrays; `cache_salt`, `session_id` |
//! | 0.5.22 | `lora_name`; replay messages carry the topic |
//!
//! The first event of a life is `AllBlocksCleared`. Under EAGLE `token_ids` are pairs: page i spans its tokens and the one
//! that follows. We keep the first of each pair, so that the page has the hash of the plain tokens; where two prompts differ
//! first in the token right after a page, that page is claimed for both: at most one block too many.

use super::fields::{Fields, Identity};
use std::borrow::Cow;

pub(super) fn identity<'a>(fields: &Fields<'a>) -> Identity<'a> {
    Identity {
        adapter: fields.lora_name.map(Cow::Borrowed),
        salt: fields.cache_salt.map(Cow::Borrowed),
        media: Vec::new(),
    }
}
