//! The comparison for programs: every figure of every seed, and the curves of the first.

use super::Comparison;
use crate::outcome::Quantiles;
use serde_json::{Value, json as value};

/// One JSON object, times in milliseconds, shares from 0 to 1.
pub fn json(c: &Comparison) -> String {
    let Comparison {
        trace,
        requests,
        input_tokens,
        block_tokens,
        closed_loop,
        ttft_target_ms,
        seeds,
        bounds,
        cells,
    } = c;
    let object = value!({
        "trace": trace,
        "requests": requests,
        "input_tokens": input_tokens,
        "block_tokens": block_tokens,
        "closed_loop": closed_loop,
        "ttft_target_ms": ttft_target_ms,
        "seeds": seeds,
        "bounds": bounds.iter().map(|(workers, b)| value!({
            "workers": workers,
            "infinite": b.infinite,
            "pooled_lru": b.pooled_lru,
            "pooled_belady": b.pooled_belady,
            "least_ttft_ms": quantiles(&b.least_ttft_ms),
        })).collect::<Vec<_>>(),
        "cells": cells.iter().map(|cell| value!({
            "workers": cell.workers,
            "speed": cell.speed,
            "policy": cell.policy,
            "runs": cell.runs.iter().map(|s| value!({
                "unanswered": s.unanswered,
                "hit_rate": s.hit_rate,
                "overpredicted": s.overpredicted,
                "ttft_ms": quantiles(&s.ttft_ms),
                "e2e_ms": quantiles(&s.e2e_ms),
                "busy_max_over_mean": s.busy_max_over_mean,
                "computed_max_over_mean": s.computed_max_over_mean,
                "utilisation": s.utilisation,
                "goodput": s.goodput,
                "preemptions": s.preemptions,
            })).collect::<Vec<_>>(),
            "curves": {
                "ttft_ms": cell.curves.ttft_ms,
                "e2e_ms": cell.curves.e2e_ms,
                "slice_s": cell.curves.slice_s,
                "busiest": cell.curves.busiest,
                "hit_rate": cell.curves.hit_rate,
                "worst_ttft_ms": cell.curves.worst_ttft_ms,
            },
        })).collect::<Vec<_>>(),
    });
    let mut text = object.to_string();
    text.push('\n');
    text
}

fn quantiles(q: &Quantiles) -> Value {
    value!({ "mean": q.mean, "p50": q.p50, "p90": q.p90, "p99": q.p99, "max": q.max })
}
