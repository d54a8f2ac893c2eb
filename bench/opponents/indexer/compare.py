#!/usr/bin/env python3
"""The reference's standalone indexer and kvlane's, asked the same: are all answers alike?

Starts both, lets both hear the same engines (PUB and ROUTER sockets of this script), makes the same calls, and prints a table:
status and body alike, or how they differ. Lists, maps of one key order and texts of errors are compared as JSON values; error texts are
compared only by status, since they are for people.

usage: compare.py REFERENCE_BINARY KVLANE_BINARY        (needs pyzmq, msgpack and xxhash from PyPI)
"""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import msgpack
import xxhash
import zmq

BLOCK = 4
MODEL = "m"
SETTLE_S = 3.0


class Engine:
    """A publisher with a replay socket that remembers everything."""

    def __init__(self, context):
        self.pub = context.socket(zmq.PUB)
        self.port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.router = context.socket(zmq.ROUTER)
        self.replay_port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.sent = []
        self.lock = threading.Lock()
        threading.Thread(target=self.replay, daemon=True).start()

    def replay(self):
        while True:
            peer, empty, start = self.router.recv_multipart()
            start = struct.unpack(">Q", start)[0]
            with self.lock:
                found = [m for m in self.sent if m[0] >= start]
            for seq, payload in found:
                self.router.send_multipart([peer, empty, b"", struct.pack(">Q", seq), payload])
            self.router.send_multipart([peer, empty, b"", struct.pack(">q", -1), b""])

    def publish(self, *events):
        payload = msgpack.packb([time.time(), list(events), 0])
        with self.lock:
            seq = len(self.sent)
            self.sent.append((seq, payload))
        self.pub.send_multipart([b"", struct.pack(">Q", seq), payload])

    def endpoints(self):
        return {"endpoint": f"tcp://127.0.0.1:{self.port}", "replay_endpoint": f"tcp://127.0.0.1:{self.replay_port}"}


def stored(names, tokens, parent=None, lora=None, medium="GPU", salt=None):
    event = {
        "type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens,
        "block_size": BLOCK, "lora_id": None, "medium": medium, "lora_name": lora,
    }
    if salt is not None:
        event["extra_keys"] = [(salt,)] + [None] * (len(names) - 1)
    return event


def removed(names, medium="GPU"):
    return {"type": "BlockRemoved", "block_hashes": names, "medium": medium}


def hashes(tokens, lora=None):
    seed = 1337
    if lora:
        seed = (seed + xxhash.xxh3_64_intdigest(lora.encode())) % 2**64
    whole = len(tokens) // BLOCK * BLOCK
    out = []
    for at in range(0, whole, BLOCK):
        block = struct.pack(f"<{BLOCK}I", *tokens[at : at + BLOCK])
        out.append(xxhash.xxh3_64_intdigest(block, seed))
    return [h - 2**64 if h >= 2**63 else h for h in out]


def call(base, method, path, body=None, raw=None):
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data=data, method=method)
    if data is not None:
        request.add_header("content-type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode(errors="replace")
    except (urllib.error.URLError, ConnectionError, BrokenPipeError) as error:
        return "no answer", str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command, base):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(400):
        if call(base, "GET", "/health")[0] == 200:
            return process
        time.sleep(0.05)
    process.kill()
    sys.exit(f"{command[0]} does not start")


def plain(answer):
    """What is compared: the status; and the body, but not an error's text nor what only one run can know."""
    status, body = answer
    if status != 200 and status != 201:
        return status, None
    return status, body


def dumped(answer):
    """A dump as what it means: which hashes each rank holds after which."""
    status, body = answer
    if status != 200:
        return status, None
    out = {}
    for key, entry in body.items():
        held = set()
        for event in entry["events"]:
            data = event["event"]["data"]
            where = (event["worker_id"], event["event"].get("dp_rank", 0), event["storage_tier"])
            if "stored" in data:
                parent = data["stored"]["parent_hash"]
                for block in data["stored"]["blocks"]:
                    held.add((*where, parent, block["block_hash"], block["tokens_hash"]))
                    parent = block["block_hash"]
        out[key] = (entry["block_size"], sorted(held, key=str))
    return status, out


class Table:
    def __init__(self, bases):
        self.bases, self.rows, self.differ = bases, [], 0

    def ask(self, what, method, path, body=None, raw=None, note="", settle=True, shape=plain):
        """Asks both until they agree (events take a moment), or for as long as the settling time."""
        deadline = time.time() + (SETTLE_S if settle else 0)
        while True:
            answers = [call(base, method, path, body, raw) for base in self.bases]
            seen = [shape(a) for a in answers]
            if seen[0] == seen[1] or time.time() > deadline:
                break
            time.sleep(0.05)
        alike = seen[0] == seen[1]
        self.differ += not alike
        statuses = [str(a[0]) for a in answers]
        self.rows.append((what, f"{method} {path.split('?')[0]}", *statuses, "alike" if alike else "differs", note))
        if not alike:
            print(f"differs: {what}\n  reference {answers[0]}\n  kvlane    {answers[1]}", file=sys.stderr)

    def once(self, *args, **kwargs):
        self.ask(*args, settle=False, **kwargs)

    def show(self):
        print("| what | call | reference | kvlane | answers | why |\n|---|---|---|---|---|---|")
        for row in self.rows:
            print("| " + " | ".join(row) + " |")


def main():
    reference, kvlane = sys.argv[1:]
    ports = free_port(), free_port()
    bases = [f"http://127.0.0.1:{port}" for port in ports]
    processes = [
        start([reference, str(ports[0])], bases[0]),
        start([kvlane, "indexer", "--listen", f"127.0.0.1:{ports[1]}"], bases[1]),
    ]
    try:
        run(Table(bases))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(table):
    context = zmq.Context()
    a, b = Engine(context), Engine(context)
    prompt = list(range(100, 140))

    def register(instance, engine, **more):
        return {"instance_id": instance, "model_name": MODEL, "block_size": BLOCK, **engine.endpoints(), **more}

    def query(tokens, **more):
        return {"token_ids": tokens, "model_name": MODEL, **more}

    table.once("healthy", "GET", "/health")
    table.once("no workers", "GET", "/workers")
    table.once("empty dump", "GET", "/dump")
    table.once("unknown model", "POST", "/query", query(prompt))
    table.once("unknown model by hash", "POST", "/query_by_hash", {"block_hashes": [1], "model_name": MODEL})
    a.publish(stored([1, 2, 3, 4, 5], prompt[:20]))
    table.once("register", "POST", "/register", register(7, a, dp_rank=0))
    table.once("register a second", "POST", "/register", register(9, b))
    table.once("the same again", "POST", "/register", register(7, a))
    table.once("elsewhere too", "POST", "/register", register(7, a, model_name="other"))
    table.once("another block size", "POST", "/register", register(11, a, block_size=8))
    table.once("a bad endpoint", "POST", "/register", register(12, a, endpoint="nonsense"))
    table.once("a bad replay endpoint", "POST", "/register", register(12, a, replay_endpoint="nonsense"))
    table.once("a field missing", "POST", "/register", {"instance_id": 1})
    table.once("a negative instance", "POST", "/register", register(-1, a))
    table.once("no JSON", "POST", "/register", raw=b"{")
    table.once("a GET", "GET", "/register")
    table.once("no such path", "GET", "/nothing")
    table.ask("what was published before", "POST", "/query", query(prompt),
              note="the reference asks for what it missed only when the next batch shows a hole")
    a.publish(stored([90], list(range(9000, 9004))))
    b.publish(stored([1, 2], prompt[:8]))
    table.ask("two workers", "POST", "/query", query(prompt))
    table.ask("the same by hash", "POST", "/query_by_hash", {"block_hashes": hashes(prompt), "model_name": MODEL})
    table.ask("in the default group by name", "POST", "/query", query(prompt, routing_group="default"))
    table.ask("in another group", "POST", "/query", query(prompt, routing_group="g"))
    table.ask("less than a block", "POST", "/query", query(prompt[:3]))
    table.ask("an empty prompt", "POST", "/query", query([]))
    table.ask("no hashes", "POST", "/query_by_hash", {"block_hashes": [], "model_name": MODEL})
    table.ask("a salt by hash", "POST", "/query_by_hash", {"block_hashes": [1], "model_name": MODEL, "cache_salt": "s"})
    table.once("too long", "POST", "/query", raw=b" " * (8 * 1024 * 1024 + 1), note="")
    table.ask("the workers", "GET", "/workers", shape=lambda a: (a[0], sorted(a[1], key=str)))
    table.ask("the workers of a model", "GET", "/workers?model_name=m", shape=lambda a: (a[0], sorted(a[1], key=str)))
    table.ask("the workers of no model", "GET", "/workers?model_name=x")
    table.ask("the dump", "GET", "/dump", shape=dumped)

    b.publish(removed([2]))
    table.ask("a removed tail", "POST", "/query", query(prompt))
    b.publish(stored([20], prompt[4:8], parent=1, medium="CPU_PINNED"))
    table.ask("continued in host memory", "POST", "/query", query(prompt))
    b.publish(stored([21], prompt[8:12], parent=20, medium="DISK"))
    table.ask("and on disk", "POST", "/query", query(prompt))
    table.ask("the dump with tiers", "GET", "/dump", shape=dumped)
    a.publish(removed([3]))
    table.ask("a removed middle", "POST", "/query", query(prompt))
    a.publish(stored([3], prompt[8:12], parent=2))
    table.ask("the middle back again", "POST", "/query", query(prompt),
              note="the engine holds all five again; the reference has forgotten the tail")
    a.publish({"type": "AllBlocksCleared"})
    table.ask("cleared", "POST", "/query", query(prompt))
    other = list(range(1000, 1040))
    a.publish(stored([31, 32], other[:8], lora="adapter"))
    table.ask("an adapter", "POST", "/query", query(other, lora_name="adapter"))
    table.ask("without the adapter", "POST", "/query", query(other))
    by_hash = {"block_hashes": hashes(other, "adapter"), "model_name": MODEL}
    table.ask("an adapter by hash", "POST", "/query_by_hash", by_hash)
    salted = list(range(2000, 2040))
    a.publish(stored([41, 42], salted[:8], salt="secret"), stored([43], salted[8:12], parent=42))
    table.ask("a salt", "POST", "/query", query(salted, cache_salt="secret"),
              note="the engine names the salt on the first block only, so the reference cannot hash the later ones as the query does")

    table.once("register a peer", "POST", "/register_peer", {"url": "http://127.0.0.1:1"})
    table.once("the peers", "GET", "/peers")
    table.once("deregister it", "POST", "/deregister_peer", {"url": "http://127.0.0.1:1"})
    table.once("again", "POST", "/deregister_peer", {"url": "http://127.0.0.1:1"})
    table.once("a peer that is none", "POST", "/register_peer", {"url": "nonsense"},
               note="the reference takes any text and fails when it asks it")
    table.once("reopen logs", "POST", "/reopen_logs")
    table.once("pausing is off", "POST", "/test/pause_listener", {"instance_id": 7})
    families = lambda a: (a[0], sorted(f for f in FAMILIES if f in a[1]))
    table.once("the metrics' families", "GET", "/metrics", shape=families)

    table.once("unregister a rank that is not", "POST", "/unregister",
               {"instance_id": 7, "model_name": MODEL, "routing_group": "default", "dp_rank": 3})
    table.once("unregister from another group", "POST", "/unregister",
               {"instance_id": 7, "model_name": MODEL, "routing_group": "g"})
    table.once("unregister", "POST", "/unregister", {"instance_id": 7, "model_name": MODEL})
    table.once("again", "POST", "/unregister", {"instance_id": 7, "model_name": MODEL})
    table.ask("what is left", "POST", "/query", query(prompt))
    table.once("unregister the last rank", "POST", "/unregister",
               {"instance_id": 9, "model_name": MODEL, "routing_group": "default", "dp_rank": 0})
    table.ask("nothing is left", "POST", "/query", query(prompt))
    table.show()
    print(f"\n{len(table.rows)} calls, {table.differ} answered otherwise")


FAMILIES = [
    "dynamo_kvindexer_request_duration_seconds", "dynamo_kvindexer_requests_total", "dynamo_kvindexer_errors_total",
    "dynamo_kvindexer_models", "dynamo_kvindexer_workers", "dynamo_kvindexer_listeners",
]

if __name__ == "__main__":
    main()
