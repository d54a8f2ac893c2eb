#!/bin/sh
# Cuts the payloads of the recorded captures into a seed corpus for events_wire.
set -eu
cd "$(dirname "$0")"
mkdir -p corpus/events_wire
python3 - <<'PY'
import glob, hashlib, json
for name in glob.glob("../crates/kvlane-events/tests/captures/*/*.jsonl"):
    engine = {"v": 0, "s": 1, "t": 2}[name.split("/")[-2][0]]
    for line in open(name):
        line = json.loads(line)
        if line["kind"] == "frames" and line["frames_hex"][-1]:
            data = bytes([engine]) + bytes.fromhex(line["frames_hex"][-1])
            with open(f"corpus/events_wire/{hashlib.sha1(data).hexdigest()}", "wb") as out:
                out.write(data)
PY
