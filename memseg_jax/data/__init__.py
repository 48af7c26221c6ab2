"""Data sets: where samples come from, how they are augmented, and how they are batched.

A data set is a module of this package with a function `open_split(data_config, split)` that
returns a source; `config.data.name` is the name of the module, and nothing is registered. A
source is a picklable object with

* `len(source)`;
* `source[index]`: `dict(image, label, name)` with `image` uint8 `[height, width, 3]` (RGB),
  `label` uint8 `[height, width]` (0..K-1, or `IGNORE_LABEL`) and `name`, a short unique id;
* `source.describe(index)`: the files behind a sample, for messages;
* `source.fingerprint()`: a short hash of the ordered names;
* optionally `source.expect(indices)`: hears which samples are asked for next, to read ahead;
* optionally `source.label(index)`: the label alone, where that is quicker;
* optionally `source.has_labels`: False if the labels of the split are not public, so that all
  pixels of its samples are ignored;
* optionally `source.groups`: numbers of consecutive samples that belong together, such as the
  frames of a video; an epoch of training draws one sample of each group;
* optionally `source.official_size`: how many samples a published split should have, or None.

With `config.data.packed` set, the samples of any data set come from that folder (see `packed`). It
is refused if fields of `config.data` have changed since it was written, so everything that decides
what the samples are should be such a field. That folder, or `config.data.root`, may be in a bucket:
`staging` copies it to this machine, so that no data set has to know of buckets.

The module may have a `BENCHMARK`, an `official.Benchmark`: what the server of its benchmark takes.
"""

import functools
import importlib
from pathlib import Path

from memseg_jax.errors import UserError
from memseg_jax.runtime import files

IGNORE_LABEL = 255  # the value in memory that means "not labelled", whatever the files use


def open_split(data_config, split: str, *, needs_labels: bool = True):
    """Opens one split of the data set that `data_config.name` names.

    Args:
        data_config: `config.data`. A root in a bucket is copied before this returns.
        split: name of the split, such as "train".
        needs_labels: refuse a split whose labels are not public, such as a test split.

    Returns:
        The source (see the module's text).

    Raises:
        UserError: the data set's module cannot open the split, or the split has no labels.
    """
    name = data_config.name
    if data_config.packed:
        from memseg_jax.data import packed

        source = packed.open_packed(data_config, split)
    else:
        if data_config.root and files.in_bucket(files.place(data_config.root, "config.data.root")):
            from memseg_jax.data import staging

            data_config = staging.copied_root(data_config)
        source = importlib.import_module(f"{__name__}.{name}").open_split(data_config, split)
    if needs_labels and not getattr(source, "has_labels", True):
        raise UserError(
            f"split {split!r} of {name}: its labels are not public, so nothing can be trained or "
            "scored on it. Choose another config.data.train_split or config.data.eval_split; "
            "--mode evaluate with --config.eval.save_predictions=FOLDER segments its images."
        )
    return source


def benchmark_of(data_config):
    """Returns the `BENCHMARK` of a data set, or None if it has none.

    Args:
        data_config: `config.data`, which was opened before.
    """
    module = importlib.import_module(f"{__name__}.{data_config.name}")
    return getattr(module, "BENCHMARK", None)


@functools.cache
def data_sets() -> tuple[str, ...]:
    """Returns the names of all data sets: the modules of this package with an `open_split`."""
    # The text is searched because importing all modules could fail for reasons of their own.
    return tuple(
        sorted(
            path.stem
            for folder in __path__
            for path in Path(folder).glob("*.py")
            if path.stem != "__init__" and "\ndef open_split(" in path.read_text(encoding="utf-8")
        )
    )
