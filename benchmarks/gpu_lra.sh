#!/usr/bin/env bash
# The full budget of Long-Range Arena with LeaPformer, cosFormer and softmax on one NVIDIA GPU, several runs at once, until 25
# minutes are over: as many of the tasks as there is data for. Each run writes its results when it is finished; the table of those is
# written at the end. What the time cut off goes on with the same command.
#
#   benchmarks/gpu_lra.sh [DATA [OUTPUT]]     DATA (data) holds the folders lra-TASK, OUTPUT (runs/gpu-lra) gets the runs
#
# Needs a Python with PyTorch for GPUs and what the extras lm and plots name, and nothing of this package installed.
# PYTHON chooses it, TASKS, MECHANISMS and SEEDS what runs, MINUTES for how long, AT_ONCE how many runs share the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} data=${1:-data} output=${2:-runs/gpu-lra}
tasks=${TASKS:-listops text image retrieval pathfinder} mechanisms=${MECHANISMS:-leap cosformer softmax}
seeds=${SEEDS:-1} minutes=${MINUTES:-25} at_once=${AT_ONCE:-6}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=2

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "benchmarks/gpu_lra.sh: expected a Python with PyTorch and a GPU, found none in $python (set PYTHON=...)" >&2
    exit 2
fi
found=()
for task in $tasks; do
    if [ -f "$data/lra-$task/card.json" ]; then found+=("$task"); else echo "$data/lra-$task: not there, left out" >&2; fi
done
if [ ${#found[@]} -eq 0 ]; then
    echo "benchmarks/gpu_lra.sh: expected prepared data in $data/lra-TASK, found none" >&2
    exit 2
fi

mkdir -p "$output"
deadline=$(($(date +%s) + minutes * 60 - 60)) # a minute for the table
export python seeds data output deadline
# The task comes first in the order, so that the three mechanisms of one are compared even where the time is short.
for task in "${found[@]}"; do
    for mechanism in $mechanisms; do echo "$task $mechanism"; done
done | xargs -P "$at_once" -L 1 bash -c '
    left=$((deadline - $(date +%s)))
    [ "$left" -gt 5 ] || exit 0
    # SIGINT: the run saves what it has.
    timeout --signal=INT --kill-after=30 "$left" \
        "$python" -m leapformer lra --tasks "$0" --attention "$1" --seeds "$seeds" --data "$data" --output "$output" \
        >"$output/$0-$1.log" 2>&1 || echo "$0 $1: not finished, see $output/$0-$1.log" >&2
'
"$python" -c 'import torch; print("GPU:", torch.cuda.get_device_name())' | tee "$output/gpu.txt"
"$python" -m leapformer lra --tasks "$(IFS=,; echo "${found[*]}")" --attention "${mechanisms// /,}" --seeds "$seeds" \
    --data "$data" --output "$output" --only-table
