#!/usr/bin/env python3
"""An engine made of pyzmq and msgspec: vLLM's sockets and wire forms around a small prefix cache, with faults on demand.

Its publisher is written like vLLM's: one thread that takes batches from a queue, numbers and sends them, and looks at its ROUTER between
two of them. HTTP answers what a router's probe asks, `/v1/completions` for prompts of token ids (with the truth in `cached_tokens`),
`/reset_prefix_cache`, and `POST /mock/faults`:

    drop, duplicate, reorder   probabilities, of a batch that is published
    delay_ms                   before each batch
    replay_batches             a replay ends after so many, without its end marker (0: answers nothing)

See test_faults.py, which starts it; ends with SIGTERM.
"""
import argparse
import collections
import hashlib
import json
import queue
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import zmq

END = (2**64 - 1).to_bytes(8, "big")


class Cache:
    """Blocks by a hash of their prefix; the least recently used goes first, the end of a chain before its beginning."""

    def __init__(self, blocks, block_size):
        self.blocks, self.block_size = blocks, block_size
        self.held = collections.OrderedDict()  # hash -> None, the oldest first

    def chain(self, tokens):
        above, chain = b"", []
        for at in range(0, len(tokens) - self.block_size + 1, self.block_size):
            above = hashlib.sha256(above + msgspec.msgpack.encode(tokens[at:at + self.block_size])).digest()
            chain.append(int.from_bytes(above[:8], "big"))
        return chain

    def run(self, tokens):
        """Tokens taken from the cache, and the events of computing the others."""
        chain = self.chain(tokens)
        hit = 0
        while hit < len(chain) and chain[hit] in self.held:
            hit += 1
        # The last token is always computed.
        cached = min(hit, (len(tokens) - 1) // self.block_size)
        # A beginning is used later than its end, so it stays longer.
        for name in reversed(chain[:hit]):
            self.held.move_to_end(name)
        events = []
        new = chain[hit:self.blocks]
        gone = []
        for _ in range(max(0, len(self.held) + len(new) - self.blocks)):
            gone.append(self.held.popitem(last=False)[0])
        if gone:
            events.append({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
        if new:
            # What was evicted may be the hit itself.
            parent = chain[hit - 1] if hit else None
            span = tokens[hit * self.block_size:(hit + len(new)) * self.block_size]
            events.append({"type": "BlockStored", "block_hashes": new, "parent_block_hash": parent, "token_ids": span,
                           "block_size": self.block_size, "lora_id": None, "medium": "GPU", "lora_name": None})
        for name in reversed(new):
            self.held[name] = None
        for name in reversed(chain[:hit]):
            if name in self.held:
                self.held.move_to_end(name)
        return cached * self.block_size, events

    def clear(self):
        self.held.clear()
        return [{"type": "AllBlocksCleared"}]


class Publisher(threading.Thread):
    def __init__(self, given):
        super().__init__(daemon=True)
        context = zmq.Context.instance()
        self.pub, self.router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.pub.set_hwm(100_000)
        self.pub.bind(f"tcp://127.0.0.1:{given.events_port}")
        self.router.bind(f"tcp://127.0.0.1:{given.replay_port}")
        self.given, self.faults, self.random = given, {}, random.Random(given.events_port)
        self.queue = queue.Queue(100_000)
        self.kept = collections.deque(maxlen=given.buffer_steps)
        self.seq, self.overtaken = 0, None

    def encode(self, events):
        def event(fields):
            if self.given.form == "map":
                return fields
            # Positional, as vLLM 0.14 to 0.16.
            tag = fields["type"]
            order = {"BlockStored": ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"],
                     "BlockRemoved": ["block_hashes", "medium"], "AllBlocksCleared": []}[tag]
            return [tag] + [fields[name] for name in order]
        return msgspec.msgpack.encode([time.time(), [event(e) for e in events], 0])

    def run(self):
        topic = self.given.topic.encode()
        while True:
            if self.router.poll(0):
                self.replay(topic)
            try:
                payload = self.encode(self.queue.get(timeout=0.02))
            except queue.Empty:
                continue
            message = [topic, self.seq.to_bytes(8, "big"), payload]
            self.kept.append((self.seq, payload))
            self.seq += 1
            self.send(message)

    def send(self, message):
        chance = lambda name: self.random.random() < self.faults.get(name, 0)
        time.sleep(self.faults.get("delay_ms", 0) / 1e3)
        if chance("drop"):
            return
        if self.overtaken is None and chance("reorder"):
            self.overtaken = message
            return
        self.pub.send_multipart(message)
        if chance("duplicate"):
            self.pub.send_multipart(message)
        if self.overtaken is not None:
            self.pub.send_multipart(self.overtaken)
            self.overtaken = None

    def replay(self, topic):
        frames = self.router.recv_multipart()
        if len(frames) != 3:
            return
        peer, _, first = frames
        left = self.faults.get("replay_batches", None)
        for seq, payload in list(self.kept):
            if seq < int.from_bytes(first, "big"):
                continue
            if left == 0:
                break
            left = None if left is None else left - 1
            head = [peer, b""] if self.given.framing == "old" else [peer, b"", topic]
            self.router.send_multipart(head + [seq.to_bytes(8, "big"), payload])
        if left is None:
            head = [peer, b""] if self.given.framing == "old" else [peer, b"", b""]
            self.router.send_multipart(head + [END, b""])


class Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server, given = self.server, self.server.given
        said = {
            "/health": b"", "/version": {"version": "0.32.0" if given.form == "map" else "0.14.1"},
            "/v1/models": {"object": "list", "data": [{"id": "mock", "owned_by": "vllm", "max_model_len": 8192}]},
            "/kv_event_sources": {"0": {
                "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{given.told_events_port or given.events_port}",
                "replay_endpoint": f"tcp://127.0.0.1:{given.replay_port}", "topic": given.topic}},
            "/metrics": (f"process_start_time_seconds {server.started_s}\n"
                         f'vllm:cache_config_info{{block_size="{given.block_size}",engine="0",num_gpu_blocks="{given.blocks + 1}"}} 1.0\n').encode(),
        }.get(self.path)
        self.answer({} if said is None else said, 404 if said is None else 200)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path == "/mock/faults":
            server.publisher.faults = body
            return self.answer({})
        with server.lock:
            if self.path == "/reset_prefix_cache":
                server.publisher.queue.put(server.cache.clear())
                return self.answer({})
            if self.path != "/v1/completions":
                return self.answer({}, 404)
            prompt = body["prompt"]
            cached, events = server.cache.run(prompt)
            if events:
                server.publisher.queue.put(events)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1,
                 "prompt_tokens_details": {"cached_tokens": cached}}
        self.answer({"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "model": "mock", "usage": usage,
                     "choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--events-port", type=int, required=True)
    parser.add_argument("--replay-port", type=int, required=True)
    parser.add_argument("--told-events-port", type=int, help="what /kv_event_sources says instead")
    parser.add_argument("--topic", default="kv")
    parser.add_argument("--form", choices=["map", "array"], default="map")
    parser.add_argument("--framing", choices=["old", "new"], default="new", help="of replayed batches: without or with their topic")
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--buffer-steps", type=int, default=10_000)
    given = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Http)
    server.daemon_threads = True
    server.given, server.lock, server.started_s = given, threading.Lock(), time.time()
    server.cache, server.publisher = Cache(given.blocks, given.block_size), Publisher(given)
    server.publisher.start()
    server.serve_forever()


if __name__ == "__main__":
    main()
