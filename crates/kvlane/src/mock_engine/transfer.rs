//! `kv_transfer_params`: handing a prompt's blocks from one engine to another, as far as requests and answers show it.
//!
//! The shapes are those of vLLM's NIXL connector (0.24, `kv_connector/v1/nixl`): a request with `do_remote_decode` is answered with the place of its
//! blocks, and a request with `do_remote_prefill` names such a place. What does not happen is the transfer: the receiving engine computes the
//! prompt as any other, so the mock shows that the hand-over is right and not how fast it is.

use super::error::Refusal;
use serde_json::{Value, json};

/// The parameters of an answer; null if none were asked for.
pub(super) fn answered(
    asked: Option<&Value>,
    request: &str,
    prompt_tokens: usize,
    block_tokens: usize,
) -> Value {
    if asked.is_none_or(|asked| asked["do_remote_decode"] != true) {
        return Value::Null;
    }
    let blocks: Vec<usize> = (1..=prompt_tokens.div_ceil(block_tokens)).collect();
    json!({
        "do_remote_prefill": true,
        "do_remote_decode": false,
        "remote_block_ids": [blocks],
        "remote_engine_id": "mock",
        "remote_request_id": request,
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
    })
}

/// Refuses what no engine could fetch from; vLLM warns and computes the prompt, which no test would see.
pub(super) fn check(asked: Option<&Value>) -> Result<(), Refusal> {
    let Some(asked) = asked.filter(|asked| asked["do_remote_prefill"] == true) else { return Ok(()) };
    let complete = asked["remote_engine_id"].is_string()
        && asked["remote_request_id"].is_string()
        && asked["remote_block_ids"].as_array().is_some_and(|blocks| !blocks.is_empty())
        && asked["remote_host"].is_string()
        && asked["remote_port"].is_u64();
    if complete {
        Ok(())
    } else {
        Err(Refusal::bad(
            Some("kv_transfer_params"),
            "do_remote_prefill needs remote_engine_id, remote_request_id, remote_block_ids, remote_host and remote_port",
        ))
    }
}
