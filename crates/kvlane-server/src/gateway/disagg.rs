//! Prefill and decode at different workers: the prompt is computed at one, its blocks move to another, which writes the answer.
//!
//! A long prefill delays every answer that is being written at the same engine, so fleets set workers aside for it (`--worker URL,role=prefill`). For a
//! request that is worth it, the gateway
//!
//! 1. chooses a prefill worker by cache and queue, as ever, and sends it the request for one token, not streamed, with vLLM's
//!    `kv_transfer_params` `{"do_remote_decode": true, …}`;
//! 2. takes the `kv_transfer_params` of that answer, which say where the blocks are;
//! 3. chooses the worker that decodes, where what it does not hold of the prompt costs a transfer and no computing, and sends it the client's own bytes
//!    with those parameters in front.
//!
//! Both carry the same `x-request-id`. That is the hand-over of vLLM's NIXL connector, as its own example proxies do it
//! (`tests/v1/kv_connector/nixl_integration/toy_proxy_server.py` of vLLM 0.11 and later): the order is theirs, the choices are not.
//!
//! It is not worth it where little is left to compute ([`UNCACHED_MIN`]), or where the scheduler reckons the whole to be cheaper at a decode worker, because
//! nobody's answer is stalled there, or the prefill workers are busy or hold less of the prompt. A prefill that fails costs the client time and nothing else: the decode worker computes the
//! prompt.

use super::plan::{Ask, Plan, Stage};
use super::{Gateway, Response};
use bytes::{BufMut, Bytes, BytesMut};
use http_body::Body;
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use kvlane_prompt::Endpoint;
use kvlane_sched::RequestId;
use serde_json::{Value, json};
use std::pin::pin;
use std::sync::Arc;

/// Fewer prompt tokens than this are computed where the answer is written: they fit beside its decodes into one step of an engine.
pub(super) const UNCACHED_MIN: u32 = 256;
/// Longest answer to a prefill: a token, and the numbers of the blocks.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// What the engines' proxies and connectors call it.
const PARAMS: &str = "kv_transfer_params";
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What became of the question whether to compute a prompt elsewhere.
#[derive(Clone, Debug)]
pub(crate) enum Handover {
    /// It was not put: no worker is set aside for prefill, or the request is of a kind that cannot be handed over.
    NotOffered,
    /// Not worth it, or it failed, and why.
    Bypassed(&'static str),
    /// The prompt was computed at this worker, for the request of this id.
    From {
        /// Name of the worker.
        worker: String,
        /// Name of the request for its prefill, for `/kvlane/explain`.
        id: String,
    },
}

impl Handover {
    /// As explanations show it.
    pub(crate) fn json(&self) -> Value {
        match self {
            Self::NotOffered => Value::Null,
            Self::Bypassed(why) => json!({ "bypassed_because": why }),
            Self::From { worker, id } => json!({ "worker": worker, "id": id }),
        }
    }

    /// The name used in metrics.
    const fn name(&self) -> &'static str {
        match self {
            Self::NotOffered => "not_offered",
            Self::Bypassed(why) => why,
            Self::From { .. } => "handed_over",
        }
    }
}

/// The request for the worker that decodes.
pub(super) struct Handed {
    pub(super) head: Parts,
    pub(super) body: Bytes,
}

impl Gateway {
    /// Has the prompt of `plan` computed by a prefill worker, if there are any and it is worth it. `None`: go on as if there were none; `plan` says why.
    pub(super) async fn prefill_elsewhere(
        self: &Arc<Self>,
        plan: &mut Plan,
        ask: &Ask<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Option<Handed> {
        if !plan.table.is_disaggregated() {
            return None;
        }
        let handover = self.hand_over(plan, ask, head, body).await;
        let (handover, handed) = match handover {
            Ok((handover, handed)) => (handover, Some(handed)),
            Err(handover) => (handover, None),
        };
        self.metrics.handed_over(handover.name());
        plan.handover = handover;
        handed
    }

    async fn hand_over(
        self: &Arc<Self>,
        plan: &mut Plan,
        ask: &Ask<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Result<(Handover, Handed), Handover> {
        let fields = ask.fields.filter(|fields| fields.endpoint() != Endpoint::Other);
        if fields.is_none_or(|fields| fields.n != 1) || !plan.can_be_handed_over() {
            return Err(Handover::NotOffered);
        }
        let prefill = self.staged(plan, Stage::Prefill).ok_or(Handover::Bypassed("no_prefill_worker"))?;
        if plan.least_uncached() < UNCACHED_MIN {
            return Err(Handover::Bypassed("short"));
        }
        if self.is_dearer(plan, &prefill) {
            return Err(Handover::Bypassed("cheaper_whole"));
        }
        let asked = prefill_body(body).ok_or(Handover::NotOffered)?;
        let (mut head, id) = (head.clone(), self.explanations.next_id());
        head.headers.remove(CONTENT_LENGTH);
        head.headers.entry(X_REQUEST_ID).or_insert_with(|| {
            HeaderValue::from_str(&id.to_string()).expect("hexadecimal digits and a dash")
        });
        let failed = Handover::Bypassed("failed");
        let (prefill, inflight) = self.admit(prefill).await.map_err(|_| failed.clone())?;
        let (worker, id) = (prefill.table.worker_name(inflight.worker()), inflight.record.id.to_string());
        let answer = self.forward(&prefill, inflight, &head, &asked).await;
        let params = match whole(answer).await {
            Some(answer) if answer[PARAMS].is_object() => answer[PARAMS].to_string(),
            Some(_) => {
                tracing::warn!(
                    worker,
                    "its answer to a prefill has no kv_transfer_params: is a KV connector configured there?"
                );
                return Err(Handover::Bypassed("no_kv_transfer_params"));
            }
            None => return Err(failed),
        };
        plan.fetches_prompt();
        let body = decode_body(body, &params).ok_or(failed)?;
        Ok((Handover::From { worker, id }, Handed { head, body }))
    }

    /// Whether computing the prompt elsewhere costs more than at the best worker that decodes, by the acting policy's reckoning, to which is added what
    /// workers are set aside for: a prefill stalls every answer that is being written beside it. Only where the policy reckons in milliseconds: others have no
    /// such sums.
    fn is_dearer(&self, plan: &Plan, prefill: &Plan) -> bool {
        let cost = |plan: &Plan| {
            // No request in flight has this id: real ones count up from 1.
            let (decision, result) = self.decide(plan, RequestId(0));
            let row = decision.row(decision.worker().filter(|_| result.is_ok())?)?;
            let prefill = decision.columns.iter().position(|column| *column == "prefill")?;
            let stalls_ms = row.terms[prefill] * f64::from(row.load.decode_requests);
            (decision.unit == "ms").then_some(row.total + stalls_ms)
        };
        let mut moved = plan.clone();
        moved.fetches_prompt();
        match (cost(plan), cost(prefill), cost(&moved)) {
            (Some(whole), Some(prefill), Some(decode)) => prefill + decode >= whole,
            _ => false,
        }
    }
}

/// The whole of an answer, if it is a success.
async fn whole(answer: Response) -> Option<Value> {
    let (head, body) = answer.into_parts();
    let mut body = pin!(body);
    let mut whole = Vec::new();
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        if whole.len() + data.len() > ANSWER_BYTES_MAX {
            return None;
        }
        whole.extend_from_slice(&data);
    }
    (head.status == StatusCode::OK).then(|| serde_json::from_slice(&whole).ok()).flatten()
}

/// The client's request, for one token and the place of its blocks. `None` where it brings parameters of its own: then it does the hand-over itself.
fn prefill_body(body: &[u8]) -> Option<Bytes> {
    let mut request: Value = serde_json::from_slice(body).ok()?;
    let fields = request.as_object_mut()?;
    if fields.contains_key(PARAMS) {
        return None;
    }
    fields.remove("stream_options");
    // An engine refuses fewer tokens than are to be written at least.
    fields.remove("min_tokens");
    fields.insert("stream".into(), json!(false));
    fields.insert("max_tokens".into(), json!(1));
    if fields.contains_key("max_completion_tokens") {
        fields.insert("max_completion_tokens".into(), json!(1));
    }
    let ask = json!({
        "do_remote_decode": true,
        "do_remote_prefill": false,
        "remote_engine_id": null,
        "remote_block_ids": null,
        "remote_host": null,
        "remote_port": null,
    });
    fields.insert(PARAMS.into(), ask);
    Some(Bytes::from(request.to_string()))
}

/// The client's own bytes with the parameters in front.
fn decode_body(body: &[u8], params: &str) -> Option<Bytes> {
    let brace = body.iter().position(|byte| !byte.is_ascii_whitespace()).filter(|at| body[*at] == b'{')?;
    let rest = &body[brace + 1..];
    let more = rest.trim_ascii_start().first() != Some(&b'}');
    let mut out = BytesMut::with_capacity(body.len() + params.len() + PARAMS.len() + 5);
    out.put_slice(b"{\"");
    out.put_slice(PARAMS.as_bytes());
    out.put_slice(b"\":");
    out.put_slice(params.as_bytes());
    if more {
        out.put_u8(b',');
    }
    out.put_slice(rest);
    Some(out.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_ask_for_one_token_and_keep_the_clients_bytes() {
        let body = br#" { "prompt" :[1,2], "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"x":1e3}"#;
        let prefill: Value = serde_json::from_slice(&prefill_body(body).expect("an object")).expect("JSON");
        assert_eq!(
            (&prefill["stream"], &prefill["max_tokens"], &prefill["max_completion_tokens"]),
            (&json!(false), &json!(1), &json!(1))
        );
        assert_eq!(prefill[PARAMS]["do_remote_decode"], true);
        assert!(prefill.get("stream_options").is_none());
        let decode = decode_body(body, r#"{"a":1}"#).expect("an object");
        assert_eq!(
            decode,
            &br#"{"kv_transfer_params":{"a":1}, "prompt" :[1,2], "stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"x":1e3}"#[..]
        );
        assert_eq!(decode_body(b"{}", "1").expect("an object"), &b"{\"kv_transfer_params\":1}"[..]);
        assert!(decode_body(b"[1]", "1").is_none() && prefill_body(b"[1]").is_none());
        assert!(prefill_body(br#"{"prompt":[1],"kv_transfer_params":null}"#).is_none());
    }
}
