#!/usr/bin/env python3
"""How near is `kvlane simulate` to real engines? Agents' sessions, scaled down, through the router to two real vLLM servers, and the same traffic simulated.

    compare_simulation.py --kvlane target/release/kvlane FOLDER [--sessions 20] [--chars 12] [--blocks 257] [--json FILE]

FOLDER has JSON lines with `session_id`, `timestamp` (microseconds), `input` and `output` as text (LMCache's agent traces have). `--chars` of text count as one
token, which is the scaling down; equal beginnings stay equal. `kvlane replay` sends the sessions (closed loop inside each), `kvlane record` writes
down what passes the router, and `kvlane simulate` plays the recording on two workers with caches of the same size. Printed are the share of prompt tokens that the
engines said were cached, and the simulator's, for each of `--policies` (those that know the prompts' tokens: nothing else can be recorded with its ids).
"""
import argparse
import json
import random
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from engines import Engine

BLOCK = 32      # tokens: what vLLM's CPU kernel takes
SIM_BLOCK = 16  # tokens: the simulated engine's
START_S = 60    # sessions begin within this time
LONGEST = 4000  # tokens of a prompt; longer ones are left out


def trace(folder, sessions, chars, path):
    """The sessions in Mooncake's fields, whole prompts, one id for each block of each beginning."""
    ids, rows, dice = {}, [], random.Random(1)
    for session, file in enumerate(sorted(Path(folder).glob("*.jsonl"))[:sessions]):
        turns = sorted((json.loads(line) for line in file.open()), key=lambda turn: turn["timestamp"])
        begins, before = dice.uniform(0, START_S), None
        for turn in turns:
            text, piece = turn["input"], chars * BLOCK
            if len(text) // chars > LONGEST:
                continue
            blocks = [ids.setdefault(text[:end], len(ids)) for end in range(piece, len(text) + 1, piece)]
            row = {"session_id": session, "input_length": max(len(text) // chars, 1), "output_length": max(len(turn["output"]) // chars, 1), "hash_ids": blocks}
            if before is None:
                row["timestamp"] = begins * 1000
            else:
                row["delay"] = min(max(turn["timestamp"] - before, 0) / 1000, 3000)
            before = turn["timestamp"]
            rows.append((begins, session, row))
    rows.sort(key=lambda row: row[:2])
    path.write_text("".join(json.dumps(row) + "\n" for _, _, row in rows))
    return len(rows)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ready(url):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the router is not ready after 120 s")


def run(kvlane, engines, policy, path, count, logs):
    """Replays and records under one policy; gives the engines' hit rate, and the simulator's of the recording."""
    for engine in engines:
        engine.post("/reset_prefix_cache")
    port, recording = free_port(), logs / f"recorded-{policy}.jsonl"
    url = f"http://127.0.0.1:{port}"
    workers = [part for engine in engines for part in ("--worker", engine.url)]
    serve = [kvlane, "--log", "warn", "serve", "--listen", f"127.0.0.1:{port}", "--policy", policy, *workers]
    router = subprocess.Popen(serve, stdout=open(logs / f"router-{policy}.log", "wb"), stderr=subprocess.STDOUT)
    recorder = None
    try:
        ready(url)
        recorder = subprocess.Popen([kvlane, "record", url, recording, "--requests", str(count)])
        while not recording.exists():
            time.sleep(0.05)
        replay = [kvlane, "replay", url, path, "--block-size", str(BLOCK), "--vocabulary", "3900", "--json", "-"]
        replayed = json.loads(subprocess.run(replay, check=True, stdout=subprocess.PIPE).stdout)
        if replayed["answered"] != count:
            raise RuntimeError(f"{replayed['answered']} of {count} answered: {replayed['failed']}")
        recorder.wait(30)
    finally:
        for process in (recorder, router):
            if process and process.poll() is None:
                process.terminate()
                process.wait()
    blocks = engines[0].usable_blocks * BLOCK // SIM_BLOCK
    simulate = [kvlane, "--log", "warn", "simulate", recording, "--workers", "2", "--kv-blocks", str(blocks), "--seeds", "5", "--compare", policy, "--json", str(logs / f"simulated-{policy}.json")]
    subprocess.run(simulate, check=True, stdout=subprocess.DEVNULL)
    simulated = json.loads((logs / f"simulated-{policy}.json").read_text())
    return replayed, [run["hit_rate"] for run in simulated["cells"][0]["runs"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--kvlane", required=True)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--chars", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=257)
    parser.add_argument("--policies", default="kv,reference")
    parser.add_argument("--json")
    given = parser.parse_args()
    kvlane, logs = str(Path(given.kvlane).resolve()), Path(tempfile.mkdtemp(prefix="compare-simulation-"))
    count = trace(given.folder, given.sessions, given.chars, logs / "trace.jsonl")
    print(f"{count} requests of {given.sessions} sessions; logs in {logs}", flush=True)
    engines = [Engine(i, blocks=given.blocks, logs=logs).start() for i in range(2)]
    rows = []
    try:
        for engine in engines:
            engine.wait()
        for policy in given.policies.split(","):
            replayed, hits = run(kvlane, engines, policy, str(logs / "trace.jsonl"), count, logs)
            rows.append({"policy": policy, "real": replayed["hit_rate"], "simulated": hits, "replayed": replayed})
            print(f"{policy:12} real {100 * replayed['hit_rate']:.2f} %, simulated {100 * min(hits):.2f} to {100 * max(hits):.2f} %; "
                  f"first token p50 {replayed['first_token_ms']['p50']:.0f} ms, late p99 {replayed['late_ms']['p99']:.1f} ms", flush=True)
    finally:
        for engine in engines:
            engine.stop()
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
