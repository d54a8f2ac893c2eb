#!/usr/bin/env python3
"""Tables of BENCHMARKS.md from what run.sh left: render.py RESULTS [BENCHMARKS.md]

With a second argument, what lies between `<!-- service -->` and its end there is replaced.
"""
import json
import re
import statistics
import sys
from pathlib import Path


def median(values):
    """Median, with half the range where there are several."""
    values = sorted(values)
    middle = statistics.median(values)
    return f"{middle:,.0f}" if len(values) == 1 else f"{middle:,.0f} ± {(values[-1] - values[0]) / 2:,.0f}"


def service(results):
    remote = (results / "remote.txt").read_text()
    lines = ["| 1 M pairs of 16 ranks, prompts of 512 blocks, 2 cores for all | a second | p50, µs | p99, µs |", "|---|---|---|---|"]
    for name, label in [("gRPC, single calls", "gRPC, a call for each question"), ("gRPC, one stream", "gRPC, one stream of questions")]:
        found = re.findall(rf"{name}, +(\d+)/s: p50 (\d+) us, p99 (\d+) us", remote)
        if found:
            lines.append(f"| {label} | {int(found[0][0]):,} (given) | {median([int(f[1]) for f in found])} | {median([int(f[2]) for f in found])} |")
    for name in ["kvlane", "reference"]:
        found = re.findall(rf"/query_by_hash, {name}: +(\d+) a second, p50 (\d+) us, p99 (\d+) us", remote)
        if found:
            columns = " | ".join(median([int(f[i]) for f in found]) for i in range(3))
            lines.append(f"| `/query_by_hash`, 4 connections as fast as they go, {name} | {columns} |")
    boots = (results / "bootstrap.txt").read_text()
    took = [float(s) for s in re.findall(r"holds all \d+ pairs after ([\d.]+) s", boots)]
    quiet = re.findall(r"quiet: p50 (\d+) us, p99 (\d+) us", boots)
    meanwhile = re.findall(r"meanwhile: p50 (\d+) us, p99 (\d+) us", boots)
    alike = boots.count("questions alike")
    if took:
        pairs = int(re.search(r"(\d+) pairs of", boots)[1])
        spread = f"{statistics.median(took):.1f} s" + (f" ({min(took):.1f} to {max(took):.1f})" if len(took) > 1 else "")
        lines += ["", f"A new replica holds all {pairs:,} pairs after **{spread}**, and then answers 256 questions as its peer does in {alike} of {len(took)} runs. "
                  f"Its peer answers one client meanwhile with p50 {median([int(m[0]) for m in meanwhile])} µs and p99 {median([int(m[1]) for m in meanwhile])} µs "
                  f"(before: {median([int(q[0]) for q in quiet])} and {median([int(q[1]) for q in quiet])})."]
    return lines


def fleet(results):
    names = {"one": "one router", "shared": "8 routers that share their load", "alone": "8 routers that do not"}
    loads = {"busy": "shared prompts, 80/s", "turns": "conversations, 100/s"}
    lines = ["| 16 mock engines | hit rate | TTFT p50, ms | p90 | p99 | busiest engine / mean |", "|---|---|---|---|---|---|"]
    for load, title in loads.items():
        for variant, name in names.items():
            runs = [json.loads(path.read_text()) for path in sorted((results / "fleet").glob(f"{load}-{variant}-[0-9].json"))]
            if not runs:
                continue
            failed = sum(sum(r["failed"].values()) for r in runs)
            cut = sum(r["requests"] - r["answered"] for r in runs) - failed
            hits = " / ".join(f"{100 * r['hit_rate']:.1f} %" for r in runs)
            times = " | ".join(" / ".join(f"{r['first_token_ms'][p]:.0f}" for r in runs) for p in ("p50", "p90", "p99"))
            even = " / ".join(f"{r['imbalance']:.2f}" for r in runs)
            note = (f", {failed} failed" if failed else "") + (f" (stopped with {cut} requests to go)" if cut else "")
            lines.append(f"| {title}: {name}{note} | {hits} | {times} | {even} |")
    return lines


def machine(results):
    cores, kernel, cpu, date, *loads = (results / "machine.txt").read_text().strip().split("\n")
    averages = [line.rsplit("average:", 1)[-1].split(",")[0].strip() for line in loads]
    return [f"{cpu.split(':', 1)[1].strip()}; Linux {kernel}; {cores}; {date}; load average {' to '.join(averages)}, others at work on other cores."]


def main():
    results = Path(sys.argv[1])
    text = "\n".join(["", *service(results), "", *fleet(results), "", *machine(results), ""])
    if len(sys.argv) < 3:
        return print(text)
    page = Path(sys.argv[2])
    begin, end = "<!-- service -->\n", "<!-- end -->"
    before, rest = page.read_text().split(begin, 1)
    page.write_text(before + begin + text + rest[rest.index(end):])


main()
