#!/usr/bin/env bash
# The service's figures in BENCHMARKS.md: run.sh BIN OUT CORES, where BIN is a folder with `kvlane`, `replicas` (cargo bench -p kvlane-server --bench replicas --no-run)
# and, for /query_by_hash beside the reference, `reference-indexer` (bench/opponents/indexer). CORES are listed like 0,1,2: the first two for questions, the first four for a
# replica's start, all others for 8 routers over 16 mock engines (with fewer than ten, two for both; with fewer than six, one after the other on all). At most nine minutes.
# Then: render.py OUT BENCHMARKS.md.
set -u
BIN=$(cd "$1" && pwd) OUT=$2
IFS=, read -ra CORE <<< "$3"
mkdir -p "$OUT/fleet"
[ ! -x "$BIN/reference-indexer" ] || export REFERENCE_INDEXER=$BIN/reference-indexer
join() { local IFS=,; echo "$*"; }
A=$3 BOOT=$3 B=$3
if [ ${#CORE[@]} -ge 10 ]; then A=$(join "${CORE[@]:0:2}") BOOT=$(join "${CORE[@]:0:4}") B=$(join "${CORE[@]:4}")
elif [ ${#CORE[@]} -ge 6 ]; then A=$(join "${CORE[@]:0:2}") BOOT=$A B=$(join "${CORE[@]:2}"); fi
{ echo "questions on cores $A, a replica's start on $BOOT, routers on $B"; uname -r; grep -m1 'model name' /proc/cpuinfo; date -u; uptime; } > "$OUT/machine.txt"
PIDS=()
trap 'kill "${PIDS[@]}" 2>/dev/null' EXIT

service() {
  taskset -c "$A" "$BIN/replicas" remote 1000000 16 > "$OUT/remote.txt" 2> "$OUT/remote.err"
  for _ in 1 2 3; do taskset -c "$BOOT" "$BIN/replicas" bootstrap 10000000 16 >> "$OUT/bootstrap.txt" 2>> "$OUT/bootstrap.err"; done
}

# one NAME ROUTERS FLAG SEED ARGUMENTS...: 16 engines, so many routers behind a balancer, one replay.
one() {
  local name=$1 routers=$2 flag=$3 seed=$4; shift 4
  local mine=() engines=() peers=() at=() i
  for i in $(seq 16); do
    taskset -c "$B" "$BIN/kvlane" --log error mock-engine --listen 127.0.0.1:$((BASE + i)) --blocks 24576 > /dev/null 2>&1 & mine+=($!)
    engines+=(--worker "http://127.0.0.1:$((BASE + i))")
  done
  for i in $(seq "$routers"); do at+=("127.0.0.1:$((BASE + 20 + i))"); peers+=(--peer "http://127.0.0.1:$((BASE + 20 + i))"); done
  [ "$routers" -gt 1 ] || peers=()
  sleep 1
  for i in "${at[@]}"; do
    taskset -c "$B" "$BIN/kvlane" --log error serve --listen "$i" --drain 0 "${engines[@]}" "${peers[@]}" $flag > /dev/null 2>> "$OUT/fleet/$name.err" & mine+=($!)
  done
  taskset -c "$B" "$BIN/replicas" balance "127.0.0.1:$BASE" "${at[@]}" > /dev/null 2>> "$OUT/fleet/$name.err" & mine+=($!)
  PIDS+=("${mine[@]}")
  for i in "${at[@]}"; do for _ in $(seq 200); do curl -sf -o /dev/null "http://$i/ready" && break; sleep 0.1; done; done
  sleep 1
  taskset -c "$B" "$BIN/kvlane" --log error replay "http://127.0.0.1:$BASE" "$@" --seed "$seed" --json "$OUT/fleet/$name.json" > "$OUT/fleet/$name.txt" 2>> "$OUT/fleet/$name.err"
  kill "${mine[@]}" 2>/dev/null; wait "${mine[@]}" 2>/dev/null
  BASE=$((BASE + 40))
}

all() {
  local label routers flag
  for variant in "one 1 " "shared 8 " "alone 8 --no-load-sharing"; do
    read -r label routers flag <<< "$variant"
    one "$1-$label-$2" "$routers" "$flag" "$2" "${@:3}"
  done
}

fleet() {
  BASE=21000
  for seed in 1 2; do all busy $seed --generate shared-prompts --requests 2800 --rate 80 --max-output 96; done
  all turns 1 --generate multi-turn --requests 3600 --rate 100 --max-output 96
}

if [ "$A" = "$B" ]; then service; fleet; else service & S=$!; fleet; wait $S; fi
uptime >> "$OUT/machine.txt"
