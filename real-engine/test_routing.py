#!/usr/bin/env python3
"""The main job on real engines: two unmodified vLLM servers, the real binary, the official OpenAI client.

    test_routing.py --kvlane target/release/kvlane [--tokenize local|engine] [--requests 520] [--keep]

Every request is sent through kvlane. One after another, with the engines' events drained in between, the router's
`predicted_cached_tokens` must equal the engine's own `cached_tokens` each time; the one exception is the first request
to an engine after a cache reset that it has not announced yet, which must carry the cause. Each request's body also goes to two
dry runs, of a router that tokenizes by itself and of one that asks the engines: their tokens must be equal.
Ends with a line `N passed, N failed`.
"""
import argparse
import collections
import concurrent.futures
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import httpx
import openai
import zmq

from engines import MODELS, Engine

BLOCK = 32
QUIET_S = 0.05  # no event for this long after a response = drained
WORDS = ("the router holds a block of every prefix and asks which engine has cached the longest run of tokens before it "
         "sends a request on so that nobody computes twice what was known already in memory on disk or far away").split()


class Watch:
    """Listens to the engines' events beside the router, to know when they are quiet."""

    def __init__(self, engines):
        self.context = zmq.Context.instance()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        for engine in engines:
            self.socket.connect(engine.events)

    def drain(self):
        while self.socket.poll(int(QUIET_S * 1000)):
            self.socket.recv_multipart()


class Router:
    """The real binary, on a free port."""

    def __init__(self, binary, engines, tokenize, logs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [binary, "serve", "--listen", f"127.0.0.1:{port}"]
        for engine in engines:
            # The event ports are learnt from the engine: unmodified, and nothing told twice.
            command += ["--worker", engine.url]
        if tokenize == "local":
            command += ["--tokenizer", str(MODELS / "tiny-llama")]
        else:
            # An empty directory stands for a host that does not have the model's files.
            command += ["--tokenizer", "engine"]
        self.log = logs / f"kvlane-{tokenize}-{port}.log"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(self.log, "wb"))

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def json(self, path):
        return json.loads(self.get(path))

    def dry_run(self, path, body):
        request = urllib.request.Request(f"{self.url}/kvlane/explain?path={path}", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def wait_ready(self, timeout_s=60):
        end = time.monotonic() + timeout_s
        while True:
            try:
                self.get("/ready")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"kvlane is not ready; see {self.log}")
                time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        return self.process.wait(30)


class Suite:
    def __init__(self, router, compared, engines, seed):
        self.router, self.compared, self.engines = router, compared, engines
        self.random = random.Random(seed)
        self.sent = None
        self.token_counts = collections.Counter()
        http = httpx.Client(event_hooks={"request": [self.note]}, timeout=120)
        self.client = openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0, timeout=120, http_client=http)
        self.watch = Watch(engines)
        self.kinds = collections.Counter()
        self.hits = collections.Counter()
        self.causes = collections.Counter()
        self.failures = []
        self.passed = 0
        self.reset_pending = set()
        self.systems = [f"system {i}: " + self.text(120 + 40 * i) for i in range(4)]
        self.chats = []

    def text(self, words):
        return " ".join(self.random.choice(WORDS) for _ in range(words)) + f" {self.random.randrange(10**6)}"

    def check(self, good, text):
        if good:
            self.passed += 1
        else:
            self.failures.append(text)
            print("FAILED:", text, flush=True)

    # -- requests ---------------------------------------------------------------------------------------------

    def chat(self, messages, stream=False, **options):
        options.setdefault("model", "tiny")
        options.setdefault("max_tokens", 4)
        call = self.client.chat.completions.with_raw_response.create
        if not stream:
            raw = call(messages=messages, temperature=0, **options)
            return raw.headers, raw.parse().choices[0].message.content or ""
        raw = call(messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}, **options)
        text = ""
        for chunk in raw.parse():
            for choice in chunk.choices:
                text += choice.delta.content or ""
        return raw.headers, text

    def completion(self, prompt, **options):
        options.setdefault("model", "tiny")
        raw = self.client.completions.with_raw_response.create(prompt=prompt, max_tokens=4, temperature=0, **options)
        return raw.headers, raw.parse().choices[0].text

    def note(self, request):
        self.sent = (request.url.path, request.content)

    def same_tokens(self, kind):
        """The tokens that each of the routers finds for the body that was just sent."""
        path, body = self.sent
        found = {name: router.dry_run(path, body) for name, router in self.compared.items()}
        said = {name: (f["tokens_from"], f["prompt_tokens"], f["tokens_hash"]) for name, f in found.items()}
        by_ids = b'"prompt":[' in body.replace(b" ", b"")
        # Token ids need nobody's tokenizer.
        sources = all(f["tokens_from"] == ("local" if by_ids else name) for name, f in found.items())
        tokens = {s[1:] for s in said.values()}
        self.check(sources and len(tokens) == 1 and None not in next(iter(tokens)), f"{kind}: tokens are not equal: {said}")
        self.token_counts[kind] += 1

    def explain(self, headers):
        """The settled explanation: the audit may wait for the events of the request's own step."""
        path = "/kvlane/explain/" + headers["x-kvlane-request-id"]
        end = time.monotonic() + 5
        while True:
            found = self.router.json(path)
            if found.get("actual_cached_tokens") is not None and found.get("cause") != "pending":
                return found
            if time.monotonic() > end:
                return found
            time.sleep(0.01)

    def one(self, kind, send):
        """Send, drain, compare."""
        headers, text = send()
        self.watch.drain()
        found = self.explain(headers)
        predicted, actual, cause = (found.get(k) for k in ("predicted_cached_tokens", "actual_cached_tokens", "cause"))
        worker = headers["x-kvlane-worker"]
        self.kinds[kind] += 1
        self.hits[kind] += bool(actual)
        self.causes[str(cause)] += 1
        fresh_reset = next((e for e in self.reset_pending if e in worker), None)
        if fresh_reset:
            self.reset_pending.discard(fresh_reset)
        self.same_tokens(kind)
        if predicted == actual and actual is not None:
            self.passed += 1
        elif fresh_reset and actual is not None:
            self.check("reset" in str(cause), f"{kind}: first after a reset without its cause: {predicted} against {actual}, {cause}")
        else:
            self.check(False, f"{kind} #{sum(self.kinds.values())}: predicted {predicted}, actual {actual}, cause {cause}, worker {worker}, "
                              f"id {headers['x-kvlane-request-id']}")
        return text

    # -- kinds ------------------------------------------------------------------------------------------------

    def turn(self, kind="multi-turn chat", **options):
        if len(self.chats) < 6 or self.random.random() < 0.15:
            self.chats.append([{"role": "system", "content": self.random.choice(self.systems)}])
            self.chats = self.chats[-8:]
        chat = self.random.choice(self.chats)
        if len(chat) > 9:
            del chat[1:]
        chat.append({"role": "user", "content": self.text(self.random.randrange(10, 60))})
        answer = self.one(kind, lambda: self.chat(chat, **options))
        chat.append({"role": "assistant", "content": answer})

    def shared_system(self):
        messages = [{"role": "system", "content": self.random.choice(self.systems)}, {"role": "user", "content": self.text(8)}]
        self.one("shared system prompt", lambda: self.chat(messages))

    def token_ids(self):
        rng = random.Random(self.random.randrange(3))
        prompt = [rng.randrange(10, 2000) for _ in range(rng.randrange(100, 500))]
        prompt += [self.random.randrange(10, 2000) for _ in range(self.random.randrange(0, 80))]
        self.one("token ids", lambda: self.completion(prompt))

    def text_prompt(self):
        rng = random.Random(100 + self.random.randrange(3))
        prompt = " ".join(rng.choice(WORDS) for _ in range(150)) + " " + self.text(5)
        self.one("text completion", lambda: self.completion(prompt))

    def lora(self):
        if self.random.random() < 0.5:
            self.turn(kind="lora", model="tiny-lora")
        else:
            messages = [{"role": "system", "content": self.systems[0]}, {"role": "user", "content": self.text(6)}]
            self.one("lora", lambda: self.chat(messages, model="tiny-lora"))

    def salted(self):
        salt = self.random.choice(["tenant-a", "tenant-b"])
        messages = [{"role": "system", "content": self.systems[1]}, {"role": "user", "content": self.text(6)}]
        self.one("cache salt", lambda: self.chat(messages, extra_body={"cache_salt": salt}))

    def eviction(self):
        """Fills the small pool, then asks for what may be gone."""
        self.one("eviction", lambda: self.chat([{"role": "user", "content": self.text(700)}]))
        self.one("eviction", lambda: self.chat([{"role": "system", "content": self.systems[2]}, {"role": "user", "content": self.text(5)}]))

    def reset(self):
        for engine in self.engines:
            engine.post("/reset_prefix_cache")
            self.reset_pending.add(engine.url.removeprefix("http://"))
        for _ in range(4):
            messages = [{"role": "system", "content": self.random.choice(self.systems)}, {"role": "user", "content": self.text(6)}]
            self.one("cache reset", lambda m=messages: self.chat(m))

    def sequential(self, count):
        steps = [(self.turn, 34), (lambda: self.turn("streaming", stream=True), 18), (self.shared_system, 18), (self.token_ids, 10),
                 (self.text_prompt, 7), (self.lora, 10), (self.salted, 9), (self.eviction, 6), (self.reset, 1.5)]
        while sum(self.kinds.values()) < count:
            self.random.choices([s for s, _ in steps], [w for _, w in steps])[0]()

    def restart(self):
        victim = self.engines[0]
        victim.kill()
        self.check(not victim.healthy(), "the killed engine still answers")
        for _ in range(25):
            self.turn("engine killed")
        self.reset_pending.clear()
        victim.start().wait()
        healthy = time.monotonic()
        time.sleep(2 - (time.monotonic() - healthy))
        before = len(self.failures)
        for i in range(30):
            # New system prompts as well, so that the empty engine is chosen too.
            messages = [{"role": "system", "content": self.text(100) if i % 3 == 0 else self.systems[i % 4]}, {"role": "user", "content": self.text(9)}]
            self.one("engine restarted", lambda m=messages: self.chat(m))
            self.turn("engine restarted")
        print(f"after the restart: {60 - (len(self.failures) - before)} of 60 equal, from 2 s after the engine was healthy")

    def concurrent(self, clients=32, each=8):
        """All at once: every request answered, nothing left in the ledger."""
        plans = [[[{"role": "system", "content": self.random.choice(self.systems)}, {"role": "user", "content": self.text(20)}]
                  for _ in range(each)] for _ in range(clients)]

        def client(plan):
            return [self.chat(m, stream=i % 2 == 0)[0]["x-kvlane-request-id"] for i, m in enumerate(plan)]

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            ids = [i for found in pool.map(client, plans) for i in found]
        self.check(len(set(ids)) == clients * each, f"{len(set(ids))} answers to {clients * each} concurrent requests")
        self.watch.drain()
        time.sleep(1.5)
        outcomes = collections.Counter()
        for i in ids:
            found = self.router.json("/kvlane/explain/" + i)
            p, a = found.get("predicted_cached_tokens"), found.get("actual_cached_tokens")
            if a is None or p is None:
                outcomes["unaudited"] += 1
            elif p == a:
                outcomes["exact"] += 1
            else:
                outcomes[("over" if p > a else "under") + ": " + str(found.get("cause"))] += 1
        print("32 concurrent clients:", dict(outcomes))
        self.check(all(not k.endswith("None") for k in outcomes), "an inexact prediction without a cause")
        in_flight = [w["in_flight"] for w in self.router.json("/kvlane/workers")["workers"]]
        self.check(not any(any(v for v in f.values()) if isinstance(f, dict) else f for f in in_flight), f"ledger after the run: {in_flight}")

    def report(self, seconds):
        total, hits = sum(self.kinds.values()), sum(self.hits.values())
        print(f"\n{total} requests one after another in {seconds:.0f} s, {hits} with cached tokens")
        for kind in sorted(self.kinds):
            print(f"  {kind:22} {self.kinds[kind]:5} requests {self.hits[kind]:5} with cached tokens")
        print("  causes:", dict(self.causes))
        print(f"  tokens found by {' and '.join(self.compared)} compared for {sum(self.token_counts.values())} requests")
        self.check(hits * 2 >= total, f"only {hits} of {total} requests had cached tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvlane", required=True)
    parser.add_argument("--tokenize", choices=["local", "engine", "both"], default="both")
    parser.add_argument("--requests", type=int, default=520)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--running", action="store_true", help="engines 0 and 1 run already (engines.py 2 --lora --blocks 129): no kill and restart")
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvlane-real-"))
    print("logs in", logs)
    engines = [Engine(i, lora=True, blocks=129, logs=logs) for i in range(2)]
    passed = failed = 0
    began = time.monotonic()
    try:
        if not given.running:
            for engine in engines:
                engine.start()
            for engine in engines:
                engine.wait()
            print(f"two engines healthy after {time.monotonic() - began:.0f} s", flush=True)
        for tokenize in ["local", "engine"] if given.tokenize == "both" else [given.tokenize]:
            routers = {name: Router(given.kvlane, engines, name, logs) for name in ("local", "engine")}
            router = routers[tokenize]
            try:
                for each in routers.values():
                    each.wait_ready()
                suite = Suite(router, routers, engines, given.seed)
                start = time.monotonic()
                suite.sequential(given.requests if tokenize != "engine" or given.tokenize == "engine" else given.requests // 4)
                if not given.running and tokenize == "local":
                    suite.restart()
                    for kind in ("multi-turn chat", "shared system prompt", "streaming", "token ids", "lora", "cache salt", "cache reset",
                                 "eviction", "engine killed", "engine restarted"):
                        suite.check(suite.kinds[kind] >= 20, f"only {suite.kinds[kind]} requests of kind {kind}")
                suite.report(time.monotonic() - start)
                suite.concurrent()
                print(f"tokenized by {tokenize}: {suite.passed} passed, {len(suite.failures)} failed (seed {given.seed})\n", flush=True)
                passed, failed = passed + suite.passed, failed + len(suite.failures)
            finally:
                codes = [(each, each.stop()) for each in routers.values()]
            for each, code in codes:
                if code != 0:
                    failed += 1
                    print(f"FAILED: kvlane ended with {code} on SIGTERM; see {each.log}")
    finally:
        if not given.running:
            for engine in engines:
                engine.stop()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
