#!/usr/bin/env bash
# Every mode once, in a few minutes, as a user does who has no clone of the repository: in a folder
# of their own, with a config file of their own, and their own images.
# Usage: tests/smoke.sh FOLDER   (a new folder; the `python` on the PATH has the package installed)
set -euo pipefail
mkdir -p "$1"
cd "$1"
python - <<'PY'
import pathlib
import memseg_jax
from memseg_jax.data.shapes import Shapes
from memseg_jax.scoring.visualize import save_png

print("memseg_jax is", pathlib.Path(memseg_jax.__file__).parent)
for split, count in (("train", 16), ("val", 4)):
    shapes = Shapes(split, count, (80, 120))
    for index, sample in enumerate(map(shapes.__getitem__, range(count))):
        for kind in ("image", "label"):
            folder = pathlib.Path("data", f"{kind}s", split)
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"{index}.png", sample[kind])
PY
mkdir configs
cat > configs/base.py <<'PY'
from configs import own_folder
from memseg_jax.data import shapes


def get_config():
    config = own_folder.get_config("data", shapes.CLASS_NAMES, crop=(64, 64), epochs=2)
    config.model.backbone_width = 0.125
    config.model.feature_dim = config.model.aspp_dim = 32
    config.model.memory.enabled = True
    config.model.memory.attention_dim = 16
    config.train.batch_size = 4
    config.train.log_every = 2
    return config
PY
cat > mine.py <<'PY'
from configs import base, common


def get_config():
    config = base.get_config()
    assert config.keys() == common.get_config().keys()
    return config
PY
run() { python -m memseg_jax.main --config mine.py --workdir run "$@"; }
python -m memseg_jax.main --mode init --root data --output written.py
python -m memseg_jax.main --config written.py --mode check_data
run --mode check_data
run
run
run --mode evaluate --config.data.workers=0
run --mode verify
run --mode pack --config.data.packed=packed
run --mode evaluate --config.data.packed=packed --config.data.root=
run --mode benchmark
run --mode plan --topology cpu:2
run --mode predict --input data/images/val/0.png --output out
test -s out/0.png
test -s out/0_overlay.jpg
run --mode report
run --mode memory --input data/images/val/0.png
test -s run/memory/memory.html
run --mode export --input data/images/val/0.png
python run/export/load.py
if run --mode serve 2> serve.txt; then exit 1; fi  # it needs more packages, and says which
grep -F 'pip install "memseg_jax[serve]"' serve.txt
python - <<'PY'
import pathlib
import memseg_jax

result = memseg_jax.load("run").predict("data/images/val/0.png")
print(result)
assert result.overlay().size == (120, 80)
assert pathlib.Path(memseg_jax.__file__).with_name("py.typed").is_file()
PY
test -s run/metrics.csv
test -s run/metrics.json
# A config that comes with the package, and a converter.
python -m memseg_jax.main --config configs/quickstart.py --mode check_data \
  --config.data.num_train=8 --config.data.num_val=4
python -m converters.torch_to_orbax --help
echo "smoke run passed"
