//! TensorRT-LLM: the streaming path (map events since mid-2026) and Dynamo's republisher.
//!
//! Both use the framing and the map form of vLLM. The republisher leaves `medium` and `lora_id` out, names the salt in
//! `cache_salt`, and lists media in `block_mm_infos` as 64-bit hashes without offsets.

use super::fields::{Fields, Identity};

pub(super) fn identity<'a>(fields: &Fields<'a>) -> Identity<'a> {
    super::vllm::identity(fields)
}
