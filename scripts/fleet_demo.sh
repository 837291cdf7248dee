#!/usr/bin/env bash
# A fleet on this machine: a Flower server and four devices, each with a quarter of the bundled rows. At the end their
# journals and weights are compared with those of one process that has all rows.
# Usage: scripts/fleet_demo.sh [FOLDER]     MODEL=tiny and STEPS=N in the environment change what is trained
# It needs a Python with edgezo and flwr (pip install 'edgezo[flower]'): PYTHON, or that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
folder="$(realpath -m "${1:-runs/fleet}")"
programs="$(dirname "$("$python" -c 'import sys; print(sys.executable)')")"
if [ ! -x "$programs/flower-superlink" ]; then
    echo "no flwr beside $python: pip install 'edgezo[flower]', or name another Python in PYTHON" >&2
    exit 1
fi
export PATH="$programs:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
export FLWR_TELEMETRY_ENABLED=0 FLWR_HOME="$folder/flower"
names=(anna bert cleo dora)
port=9190 # of the SuperLink; those of the SuperNodes follow
sockets="$(mktemp -d)" # a socket's path has to be short
started=()
stop() {
    for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$sockets"
}
trap stop EXIT

echo "== Settings and rows in $folder"
"$python" scripts/fleet/demo_files.py "$folder" --model "${MODEL:-smollm2-135m-instruct}" --steps "${STEPS:-6}"
"$python" scripts/fleet/begin.py "$folder/server.toml"
mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$port" \
    > "$FLWR_HOME/config.toml"

# Whether every device has all steps.
is_made() {
    "$python" - "$folder/server" "${STEPS:-6}" << 'PY' || return 1
import sys
from pathlib import Path
from edgezo.run.journal import open_journal
with open_journal(Path(sys.argv[1], "journal.bin"), resume=False) as journal:
    sys.exit(journal.next_step < int(sys.argv[2]))
PY
    for name in "${names[@]}"; do cmp -s "$folder/server/journal.bin" "$folder/$name/journal.bin" || return 1; done
}
is_there() { kill -0 "$1" 2> /dev/null || { tail "$2" >&2; exit 1; }; }

# One after the other: each takes seconds to import, and Flower's processes give up on what is silent.
echo "== The processes of four devices, a SuperLink and four SuperNodes; their output is in $folder/*.log"
for name in "${names[@]}"; do
    "$python" scripts/fleet/device.py "$folder/$name.toml" --name "$name" --socket "$sockets/$name" \
        > "$folder/$name.log" 2>&1 &
    started+=($!)
    until [ -S "$sockets/$name" ]; do is_there "$!" "$folder/$name.log"; sleep 0.5; done
done
flower-superlink --insecure --port "$port" --disable-runtime-dependency-installation > "$folder/superlink.log" 2>&1 &
started+=($!)
until (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do is_there "$!" "$folder/superlink.log"; sleep 0.5; done
node_port="$port"
for name in "${names[@]}"; do
    node_port=$((node_port + 1))
    flower-supernode --insecure --superlink "127.0.0.1:$port" --port "$node_port" \
        --node-config "device=\"$sockets/$name\"" > "$folder/$name.supernode.log" 2>&1 &
    started+=($!)
    until grep -q "SuperNode ID" "$folder/$name.supernode.log"; do
        is_there "$!" "$folder/$name.supernode.log"
        sleep 0.5
    done
done

echo "== ${STEPS:-6} steps over Flower"
begun=$SECONDS
rules="directory=\"$folder/server\" devices=4 patience_s=120.0"
for attempt in 1 2 3; do # a server that has ended goes on when it is started again
    flwr run scripts/fleet/app here --stream --run-config "$rules" || true
    if is_made; then break; fi
    echo "the server has ended before the run has (attempt $attempt)"
done
echo "took $((SECONDS - begun)) s"
stop
started=()
trap - EXIT

echo "== The same steps in one process that has all rows"
"$python" -m edgezo finetune --config "$folder/one.toml" --threads 1 > "$folder/one.log" 2>&1
for name in "${names[@]}"; do
    "$python" -m edgezo replay "$folder/$name" --out "$folder/$name-replayed" > "$folder/$name.replay.log" 2>&1
done
"$python" - "$folder" "${names[@]}" <<'PY'
import hashlib, json, sys
from pathlib import Path
folder, *names = Path(sys.argv[1]), *sys.argv[2:]
def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()
one = digest(folder / "one" / "journal.bin")
weights = {n: digest(folder / f"{n}-replayed" / "trained.safetensors")[:16] for n in names}
equal = [n for n in ("server", *names) if digest(folder / n / "journal.bin") == one]
summary = json.loads((folder / "one" / "summary.json").read_text())
print(f"one process: {summary['steps']} steps, loss {summary['loss_first']:.4f} to {summary['loss_last']:.4f}")
print(f"journals byte-equal to its journal: {', '.join(equal) or 'none'}")
print(f"replayed weights of the devices: {weights}")
sys.exit(len(equal) != 1 + len(names) or len({*weights.values()}) != 1)
PY
