#!/usr/bin/env bash
# Every mode once, in a few minutes.
# Usage: tests/smoke.sh WORKDIR   (from the repository root, with `python` on the PATH)
set -euo pipefail
workdir=$1
small=(
  --config configs/quickstart.py --workdir "$workdir"
  --config.train.batch_size=4 --config.data.num_train=16 --config.data.num_val=4
  --config.model.backbone_width=0.125 --config.train.eval_every=1 --config.train.log_every=2
)
python -m memseg_jax.main "${small[@]}" --config.train.epochs=2
python -m memseg_jax.main "${small[@]}" --config.train.epochs=2
python -m memseg_jax.main "${small[@]}" --mode evaluate --config.data.workers=0
python -m memseg_jax.main "${small[@]}" --mode verify
python -m memseg_jax.main "${small[@]}" --config.data.packed="$workdir/packed" --mode pack
python -m memseg_jax.main "${small[@]}" --config.data.packed="$workdir/packed" --mode check_data
python -m memseg_jax.main "${small[@]}" --mode benchmark
python -m memseg_jax.main "${small[@]}" --mode plan --topology cpu:2
python - "$workdir" <<'PY'
import sys
from memseg_jax.scoring.visualize import save_png
from memseg_jax.data.shapes import Shapes
save_png(sys.argv[1] + "/picture.png", Shapes("val", 4, (80, 120))[0]["image"])
PY
python -m memseg_jax.main "${small[@]}" --mode predict --input "$workdir/picture.png" --output "$workdir/out"
test -s "$workdir/out/picture.png"
test -s "$workdir/out/picture_overlay.jpg"
test -s "$workdir/metrics.csv"
test -s "$workdir/metrics.json"
echo "smoke run passed"
