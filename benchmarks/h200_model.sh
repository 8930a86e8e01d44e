#!/usr/bin/env bash
# The numbers of docs/performance.md, on one GPU of 80 GB or more: about 25 minutes. Each line stands alone, so that a
# part can be run again; `ospnext bench model` writes its files after each variant.
#
#     benchmarks/h200_model.sh [FOLDER]          writes to benchmarks/results if no folder is given
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
variants=dense,osp,osp-hif8,osp-hif8-row,osp-hif8-fast,osp-hif8-attn,osp-hif8-attn-fast

# A variant that fails is a row with its error, and a status of 1 that must not end the others.
for size in 720p 768p; do
  ospnext bench model --preset 14b --resolution $size --variants $variants --against diffusers \
    --json "$out/model_14b_$size.json" --out "$out/model_14b_$size.md" || echo "some variant failed at $size" >&2
done
ospnext bench model --preset 1.3b --resolution 480p,720p --variants $variants \
  --json "$out/model_1.3b.json" --out "$out/model_1.3b.md" || echo "some variant of the 1.3B failed" >&2

python benchmarks/model_error.py --out "$out/model_error.md"
python benchmarks/training_step.py --resolution 768p --out "$out/training_step.md"
python benchmarks/token_scaling.py --out "$out/token_scaling.md"
python benchmarks/step_sync.py --out "$out/step_sync.md"
python benchmarks/cuda_fused.py --out "$out/cuda_fused.md"
python benchmarks/rank_share.py --resolution 720p,768p --out "$out/rank_share.md"
ospnext conformance run --backend cuda --out "$out/conformance" --quiet
