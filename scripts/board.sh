#!/usr/bin/env bash
# A small board's terms: a fresh environment with the extra "onnx" alone, one process, a cap of 300 MB, a time box.
# Usage: scripts/board.sh [GRAPHS]      GRAPHS: what "edgezo export MODEL --format onnx --trainable --out GRAPHS" wrote;
#        without it, SmolLM2-135M is written by the environment of scripts/setup, on the machine that has it.
# Further options of finetune come from the variable BOARD, e.g. BOARD="--blocks 10 --max-mem 200MB".
# In a memory group of the kernel (cgroup), where this user may make one: then the cap holds for the page cache too.
set -euo pipefail
cd "$(dirname "$0")/.."
max_mem=300MB
for_time=120s
run=runs/board
graphs="${1:-}"

if [ -z "$graphs" ]; then
    graphs=runs/board-graphs
    if [ ! -f "$graphs/manifest.json" ]; then
        scripts/setup
        .venv/bin/edgezo export smollm2-135m-instruct --format onnx --trainable --dtype int8 --out "$graphs"
    fi
fi

echo "== A fresh environment with the extra onnx"
rm -rf .venv-board
python3 -m venv .venv-board
.venv-board/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt ".[onnx]"
if .venv-board/bin/python -c 'import torch' 2>/dev/null; then
    echo "torch is in the environment" >&2
    exit 1
fi

command=(.venv-board/bin/edgezo finetune --engine onnx --model "$graphs" --task example --max-mem "$max_mem"
    --batch-size 8 --max-length 48 --for "$for_time" --out "$run")
# shellcheck disable=SC2206
command+=(${BOARD:-})
rm -rf "$run"
group=/sys/fs/cgroup/edgezo-board
limit=memory.max
if [ -d /sys/fs/cgroup/memory ]; then
    group=/sys/fs/cgroup/memory/edgezo-board
    limit=memory.limit_in_bytes
fi
if mkdir "$group" 2>/dev/null && [ -w "$group/$limit" ]; then
    trap 'rmdir "$group" 2>/dev/null || true' EXIT
    echo 300000000 > "$group/$limit"
    echo "== ${command[*]} (in a memory group of 300 MB)"
    bash -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group" "${command[@]}"
else
    echo "== ${command[*]} (no memory group can be made here)"
    "${command[@]}"
fi
