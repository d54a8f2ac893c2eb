#!/usr/bin/env bash
# Install a real vLLM (CPU build) and tiny models, for tests that need a real engine.
#
#   ./setup.sh            install into $REAL_ENGINE_HOME (default ~/.cache/real-engine)
#   ./setup.sh --check    exit 0 if an up-to-date install is there, 1 if not
#
# Safe to run again: it does nothing when requirements.lock and the scripts have
# not changed since the last run.
#
# Needs: x86_64 Linux with AVX2, Python 3.12 (3.11 and 3.13 work too), gcc, readelf (binutils), libnuma1, ~2.7 GB disk.
# No GPU, no model hub.  Downloads ~0.9 GB of packages with the ordinary client,
# from whatever index it is configured for.
#
# Environment:
#   REAL_ENGINE_HOME   where the venv and the models go
#   PYTHON             the Python to use
#   REAL_ENGINE_CUDA=1 install the real CUDA libraries instead of stand-ins (~3 GB more)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${REAL_ENGINE_HOME:-$HOME/.cache/real-engine}
venv=$home/venv
stamp=$home/.stamp
want=$(cat "$here/requirements.lock" "$here/stub_cuda_libs.py" "$here/make_tiny_model.py" | sha256sum | cut -d' ' -f1)-${REAL_ENGINE_CUDA:-0}

up_to_date() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/python" ]; }
if [ "${1:-}" = --check ]; then up_to_date; exit; fi
if up_to_date; then echo "real engine is up to date in $home"; exit 0; fi

fail() { echo "setup: $*" >&2; exit 1; }
[ "$(uname -sm)" = "Linux x86_64" ] || fail "needs x86_64 Linux"
grep -qw avx2 /proc/cpuinfo || fail "needs a CPU with AVX2"
for tool in gcc readelf; do command -v $tool >/dev/null || fail "needs $tool"; done
[ -n "$(ldconfig -p 2>/dev/null | grep libnuma.so.1)" ] || fail "needs libnuma.so.1 (Debian: libnuma1)"
free_mb=$(mkdir -p "$home" && df -Pm "$home" | awk 'NR==2 {print $4}')
[ "$free_mb" -ge 4000 ] || fail "needs 4 GB free in $home, has $free_mb MB"

python=
for version in 3.12 3.13 3.11; do
  for candidate in ${PYTHON:-} "python$version" "$HOME"/.pyenv/versions/"$version"*/bin/"python$version" python3; do
    if "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then python=$candidate; break 2; fi
  done
done
[ -n "$python" ] || fail "no Python 3.12, 3.13 or 3.11 with venv found; set PYTHON"

start=$SECONDS
say() { printf '[%3ds] %s\n' $((SECONDS - start)) "$*"; }
rm -f "$stamp"
say "virtual environment in $venv"
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check uv==0.13.9
: "${SSL_CERT_FILE:=${PIP_CERT:-}}"
if [ -n "$SSL_CERT_FILE" ]; then export SSL_CERT_FILE; else unset SSL_CERT_FILE; fi
say "packages (about 150, 0.9 GB)"
UV_NO_PROGRESS=1 "$venv/bin/uv" pip install -q --no-cache --python "$venv/bin/python" --no-deps -r "$here/requirements.lock"
if [ "${REAL_ENGINE_CUDA:-0}" = 1 ]; then
  say "CUDA libraries"
  UV_NO_PROGRESS=1 "$venv/bin/uv" pip install -q --no-cache --python "$venv/bin/python" "$(grep ^torch== "$here/requirements.lock")"
else
  say "stand-ins for the CUDA libraries"
  python_site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
  "$venv/bin/python" "$here/stub_cuda_libs.py" "$python_site" >/dev/null
fi
say "models"
"$venv/bin/python" "$here/make_tiny_model.py" "$home/models"
say "first import (writes the byte code, so that later starts are faster)"
VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -c '
import vllm, vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform
assert current_platform.is_cpu(), current_platform
print("vLLM", vllm.__version__, "on", current_platform.device_name)' 2>/dev/null
echo "$want" > "$stamp"
say "done: $(du -sh "$home" | cut -f1) in $home"
