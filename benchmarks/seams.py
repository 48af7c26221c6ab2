"""How much the place of the windows matters: labels that change where the windows are shifted.

python -m benchmarks.seams --config MINE.py --workdir runs/mine --input "photos/*.jpg"

Every photograph is segmented twice in blended windows, the second time without its first rows and
columns: half the distance of two windows, the worst case. Labels are compared away from the border
that was cut off, which sees less around it for a reason of its own.
"""

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import measure
from memseg_jax import checkpoint, command_line
from memseg_jax.data.images import read_image
from memseg_jax.errors import UserError
from memseg_jax.inference import Predictor, blending
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.runtime import files, sharding
from memseg_jax.training.state import abstract_variables

FLAGS = {
    "workdir": "folder of a run",
    "input": "a quoted pattern of photographs of more than four times a crop's area",
    "checkpoint": "best or last (default: best)",
}
OVERLAPS = (0.5, 0.75)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    values = measure.parse(argv, FLAGS, __doc__, True)
    if not values.workdir or not values.input:
        raise UserError("--workdir and --input are required; --help says what they are")
    config, which = values.config, values.checkpoint or "best"
    config.eval.mode = "auto"
    crop = tuple(config.augment.crop)
    photographs = [read_image(path) for path in files.matching(files.place(values.input))]
    photographs = [x for x in photographs if blending.is_large(x.shape[:2], crop)]
    if not photographs:
        raise UserError(f"--input={values.input}: no photograph of more than four crops of {crop}")
    model = build_segmentor(config)
    variables, _ = checkpoint.restore_for_inference(
        values.workdir, abstract_variables(model), which
    )
    for overlap in OVERLAPS:
        config.eval.overlap = overlap
        mesh = sharding.make_mesh(jax.local_devices()[:1])
        predictor = Predictor(model, config.eval, mesh, crop=crop)
        unit = model.coarsest_stride
        shift = [max(round(side * (1 - overlap) / 2 / unit), 1) * unit for side in crop]
        shares = []
        for image in photographs:
            inputs = enumerate([image, image[shift[0] :, shift[1] :]])
            made = {x.key: x.label for x in predictor.predict(variables, inputs)}
            changed = made[0][shift[0] :, shift[1] :] != made[1]
            shares.append(float(changed[crop[0] // 2 :, crop[1] // 2 :].mean()))
        print(
            f"overlap {overlap:.0%}: {np.mean(shares):.2%} of the labels change "
            f"(worst photograph {max(shares):.2%}, {len(shares)} photographs)"
        )
        print(json.dumps({"benchmark": "seams", "overlap": overlap, "changed": shares}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
