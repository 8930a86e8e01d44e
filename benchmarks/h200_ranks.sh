#!/usr/bin/env bash
# What ranks do over NCCL, on a machine with two GPUs: about 4 minutes. Each part writes its own file, and one that
# fails or takes too long does not stop the others. The times come first, on GPUs that do nothing else; the parts after
# them compare and run side by side.
#
#     benchmarks/h200_ranks.sh [FOLDER]          writes to benchmarks/results if no folder is given
#     OSPNEXT_BACKEND=reference TINY=1 benchmarks/h200_ranks.sh FOLDER      the same on a CPU, over gloo
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
python=${PYTHON:-python3}
export OSPNEXT_BACKEND=${OSPNEXT_BACKEND:-cuda} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # one host, whatever its name resolves to
torchrun=("$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2)
if [ "$OSPNEXT_BACKEND" = cuda ]; then device=cuda timeout=15; else device=cpu timeout=2; fi

# Seconds that it may take, its name, and the command; what it says is at the end of the log only if it fails.
part() {
  local limit=$1 name=$2 log started=$SECONDS code=0
  shift 2
  log=$(mktemp)
  timeout -k 10 "$limit" "$@" >"$log" 2>&1 || code=$?
  if [ $code = 0 ]; then
    echo "$name: done after $((SECONDS - started)) s"
  else
    echo "$name: FAILED with $code after $((SECONDS - started)) s"
    tail -n 90 "$log" # what torchrun says comes last, and is 35 lines
  fi
  rm "$log"
}

part 150 "times of ranks" "${torchrun[@]}" benchmarks/ranks_measured.py ${TINY:+--tiny} --out "$out/ranks_measured.md"

{
  part 120 "collectives" "$python" -m ospnext conformance run --backend "$OSPNEXT_BACKEND" --case 'collective/*' \
    --out "$out/conformance_collectives" --quiet
  part 60 "training" "${torchrun[@]}" benchmarks/training_across_ranks.py --out "$out/training_across_ranks.md"
} &
part 150 "videos" "$python" benchmarks/video_across_ranks.py --limit 130 --out "$out/video_across_ranks.md" &
part 150 "faults" "$python" benchmarks/fault_messages.py --device $device --ranks 2 --timeout $timeout \
  --fault killed --fault stuck --out "$out/fault_messages_ranks.txt" &
wait
