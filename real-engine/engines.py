#!/usr/bin/env python3
"""Start, kill and stop real vLLM engines on loopback, with KV-cache events on.

As a command, for use by hand:

    engines.py 2              start two engines, print one JSON line each, then READY; Ctrl-C ends them
    engines.py 2 --dp 2       the same with two data-parallel ranks each

As a module, for the tests: see `Engine`.

vLLM binds an event endpoint only if it is a wildcard, so the event ports listen on all
interfaces (HTTP is on 127.0.0.1 only): use a machine where that is acceptable.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HOME = Path(os.environ.get("REAL_ENGINE_HOME", Path.home() / ".cache" / "real-engine"))
PYTHON = HOME / "venv" / "bin" / "python"
MODELS = HOME / "models"
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 30


class Engine:
    """One engine process. Number `index` decides its ports: HTTP 18100+i, events 18200+10i, replay 18400+10i
    (data-parallel rank r adds r to the event ports)."""

    def __init__(self, index, *, blocks=129, block_size=32, max_len=None, model="tiny-llama", name="tiny", lora=False,
                 dp=1, hash_algo="sha256", buffer_steps=10_000, extra=(), logs=None):
        self.index = index
        self.port = 18100 + index
        self.events_port = 18200 + 10 * index
        self.replay_port = 18400 + 10 * index
        self.url = f"http://127.0.0.1:{self.port}"
        self.events = f"tcp://127.0.0.1:{self.events_port}"
        # One block is reserved by the engine.
        self.usable_blocks, self.block_size = blocks - 1, block_size
        max_len = max_len or min(8192, self.usable_blocks * block_size)
        self.log = Path(logs or tempfile.gettempdir()) / f"real-engine-{index}.log"
        self.process = None
        kv_events = {
            "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}", "buffer_steps": buffer_steps, "topic": f"kv@engine-{index}",
        }
        self.args = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(MODELS / model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_len), "--max-num-seqs", "16",
            "--block-size", str(block_size), "--num-gpu-blocks-override", str(blocks),
            "--enable-prefix-caching", "--prefix-caching-hash-algo", hash_algo,
            "--enable-prompt-tokens-details", "--enable-server-load-tracking",
            "--kv-events-config", json.dumps(kv_events),
        ]
        self.args += ["--distributed-executor-backend", "uni"] if dp == 1 else ["--data-parallel-size", str(dp)]
        if lora:
            self.args += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tiny-lora={MODELS / 'tiny-llama-lora'}"]
        self.args += list(extra)
        self.env = dict(
            os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
            VLLM_SERVER_DEV_MODE="1",            # /reset_prefix_cache
            VLLM_CPU_KVCACHE_SPACE="1",          # upper bound in GiB; `blocks` sets the size
            VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
        if dp == 1:
            # One process less: the model runs inside the engine core.
            self.env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    def start(self):
        """Begin to start; `wait` says when it is healthy."""
        if self.healthy():
            raise RuntimeError(f"something answers at {self.url} already; end it first")
        with open(self.log, "ab") as log:
            # A session of its own, so that `kill` reaches its children and nothing else.
            self.process = subprocess.Popen(self.args, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        return self

    def healthy(self):
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait(self):
        """Until healthy, looking every 50 ms."""
        end = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"engine {self.index} stopped while starting; see {self.log}")
            if time.monotonic() > end:
                raise RuntimeError(f"engine {self.index} is not healthy after {START_TIMEOUT_S} s; see {self.log}")
            time.sleep(0.05)
        return self

    def kill(self):
        """SIGKILL, as a crash."""
        if self.process:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self):
        """SIGTERM, then SIGKILL to what is left."""
        if self.process:
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
            self.kill()

    def _signal(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def post(self, path, body=None):
        request = urllib.request.Request(self.url + path, method="POST", data=json.dumps(body or {}).encode(),
                                         headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--blocks", type=int, default=513)
    parser.add_argument("--block-size", type=int, default=32, help="a multiple of 32: the CPU attention kernel takes no other")
    parser.add_argument("--model", default="tiny-llama", help="tiny-llama, or tiny-gemma3 (four KV-cache groups)")
    parser.add_argument("--lora", action="store_true", help="serve the adapter as model tiny-lora")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks per engine")
    parser.add_argument("--hash", default="sha256", help="--prefix-caching-hash-algo")
    given = parser.parse_args()
    if not PYTHON.exists():
        sys.exit("engines: run setup.sh first")
    engines = [Engine(i, blocks=given.blocks, block_size=given.block_size, model=given.model, lora=given.lora, dp=given.dp,
                      hash_algo=given.hash).start() for i in range(given.count)]
    try:
        for engine in engines:
            engine.wait()
            print(json.dumps({"engine": engine.index, "pid": engine.process.pid, "http": engine.url,
                              "events": engine.events, "log": str(engine.log)}), flush=True)
        print("READY", flush=True)
        signal.sigwait([signal.SIGINT, signal.SIGTERM])
    finally:
        for engine in engines:
            engine.stop()


if __name__ == "__main__":
    main()
