"""Whether the settings of an evaluation fit a model."""

from collections.abc import Sequence

import ml_collections

from memseg_jax.errors import UserError
from memseg_jax.inference import passes
from memseg_jax.models.segmentor import Segmentor


def check_evaluation(
    evaluation: ml_collections.ConfigDict,
    model: Segmentor,
    flip_pairs: Sequence[Sequence[int]] = (),
) -> None:
    """Refuses values of `config.eval` that do not fit the model.

    Args:
        evaluation: `config.eval`; `config_rules.check` has been asked about it.
        model: the segmentor.
        flip_pairs: `config.augment.flip_pairs`, which only matter if images are mirrored.

    Raises:
        UserError: names the field.
    """
    if evaluation.flip:
        passes.mirrored_classes(flip_pairs, model.num_classes)
    stride = model.coarsest_stride
    if evaluation.size_multiple % stride:
        raise UserError(
            f"config.eval.size_multiple is {evaluation.size_multiple}; "
            f"expected a multiple of the network's stride {stride}"
        )
    for index, canvas in enumerate(evaluation.canvases):
        if any(side % stride for side in canvas):
            raise UserError(
                f"config.eval.canvases[{index}] is {tuple(canvas)}; expected (height, width), both "
                f"multiples of the network's stride {stride}"
            )
