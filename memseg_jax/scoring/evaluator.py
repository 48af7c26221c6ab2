"""Segmenting a split and comparing with its labels: what training and the evaluate mode share.

Several processes share the images: of n processes, each segments every n-th one on its own devices,
and process 0 puts the results together.
"""

import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np

from memseg_jax.data.classes import palette_of
from memseg_jax.data.reading import map_ahead
from memseg_jax.inference import Predictor
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import bars, distributed, files, sharding
from memseg_jax.runtime.log_file import say
from memseg_jax.scoring import metrics, per_image, visualize
from memseg_jax.scoring.findings import Findings

log = logging.getLogger(__name__)

PICTURE = "examples.png"
_EXAMPLES = 4  # images in the picture
_REPORT_EVERY = 30.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result over a split.

    Attributes:
        matrix: int64 [classes, classes + 1], see `metrics.confusion_matrix`; of all processes.
        scores: see `metrics.scores`; of all processes.
        examples: (image, truth, prediction) of a few images spread over the split; only process 0
            has those of the others.
        sizes: height and width of every image by its name; only process 0 has those of the others.
        seconds: how long it took.
        findings: what a report is made of; only process 0 has those of the others.
    """

    matrix: np.ndarray
    scores: dict
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    sizes: dict[str, tuple[int, int]]
    seconds: float
    findings: Findings


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What is evaluated, and how: recorded with the scores."""
    return {
        "split": config.data.eval_split,
        "mode": config.eval.mode,
        "scales": list(config.eval.scales),
        "flip": config.eval.flip,
    }


class Evaluator:
    """Segments the evaluation split with given weights, and compares with its labels.

    It keeps compiled programs, but no weights: those are handed to each call, and their copies on
    this process's devices live no longer than the call.

    Args:
        config: the whole config; `config.eval` decides how images are segmented.
        model: the segmentor.
        source: images and labels, see `memseg_jax.data`.
        thorough: whether confidences and outlines are looked at, too, as in a report that somebody
            asked for. It takes more time than training should spend.

    Raises:
        UserError: a field of `config.eval` has an impossible value.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: Segmentor,
        source: Any,
        thorough: bool = False,
    ):
        self._source, self._thorough = source, thorough
        self._threads = config.data.threads
        self._names = tuple(config.data.class_names)
        self._palette = visualize.resolve_palette(palette_of(config.data), len(self._names))
        self._mesh = sharding.local_mesh(config.eval.rows)
        pairs, crop = config.augment.flip_pairs, config.augment.crop
        self._predictor = Predictor(model, config.eval, self._mesh, pairs, thorough, crop)

    def evaluate(
        self,
        variables: dict[str, Any],
        save: Callable[[str, np.ndarray], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Evaluation | None:
        """Segments every image of the source and compares with its label.

        Of every image, the part of its confusion matrix that is not 0 is kept, some hundreds of
        bytes; besides, there are a few pictures. All processes have to call it; they share the
        images.

        Args:
            variables: params, batch_stats and memory, on any mesh.
            save: called with the name and the label map of every sample of this process.
            stop: asked after every image whether to give up.

        Returns:
            An `Evaluation`, or None if a process gave up.
        """
        start = reported = time.monotonic()
        variables = sharding.on_own_devices(variables, self._mesh)
        source, classes = self._source, len(self._names)
        count = len(source)
        own = range(distributed.process_index(), count, distributed.process_count())
        shown = set(np.linspace(0, count - 1, min(_EXAMPLES, count)).astype(int).tolist())
        part = _Part(
            np.zeros((classes, classes + 1), np.int64), findings=Findings(classes, self._thorough)
        )
        waiting: dict[int, dict[str, np.ndarray]] = {}

        def images() -> Iterator[tuple[int, np.ndarray]]:
            for index, sample in zip(own, map_ahead(source.__getitem__, own, self._threads)):
                waiting[index] = sample
                yield index, sample["image"]

        with bars.bar(len(own), "evaluating", "image") as bar:
            for done, prediction in enumerate(self._predictor.predict(variables, images()), 1):
                sample = waiting.pop(prediction.key)
                matrix = metrics.confusion_matrix(prediction.label, sample["label"], classes)
                part.matrix += matrix
                part.findings.add(prediction, sample, matrix)
                if save:
                    save(sample["name"], prediction.label)
                    part.sizes[sample["name"]] = prediction.label.shape
                if prediction.key in shown:
                    triple = (sample["image"], sample["label"], prediction.label)
                    part.examples[prediction.key] = triple
                bar.update()
                if time.monotonic() - reported > _REPORT_EVERY:
                    reported = time.monotonic()
                    rate = done / (reported - start)
                    log.info("evaluated %d of %d images, %.2f images/s", done, len(own), rate)
                if stop and stop():
                    part.complete = False
                    break
        if not part.merge():
            return None
        return Evaluation(
            part.matrix,
            metrics.scores(part.matrix),
            [part.examples[index] for index in sorted(part.examples)],
            part.sizes,
            time.monotonic() - start,
            part.findings,
        )

    def report(self, evaluation: Evaluation, workdir: files.Place, extra: dict[str, Any]) -> None:
        """Prints the table and writes metrics.json, two CSV files and the picture of examples.

        Args:
            evaluation: the result.
            workdir: folder of the run.
            extra: further entries for metrics.json, such as the step.
        """
        scores, names = evaluation.scores, self._names
        say(metrics.format_table(scores, names))
        extra = {"images": len(self._source)} | extra
        metrics.write_results(workdir, scores, evaluation.matrix, names, extra)
        per_image.write_csv(workdir, evaluation.findings.per_image, names)
        sheet = visualize.comparison_sheet(evaluation.examples, names, self._palette)
        visualize.save_png(workdir / PICTURE, sheet)
        log.info(
            "wrote metrics.json, per_class.csv, %s and %s in %s", per_image.FILE, PICTURE, workdir
        )


@dataclasses.dataclass
class _Part:
    """What one process has seen of a split; the attributes are those of `Evaluation`."""

    matrix: np.ndarray
    _: dataclasses.KW_ONLY
    findings: Findings
    examples: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    complete: bool = True

    def merge(self) -> bool:
        """Adds up the matrices of all processes; returns whether all of them were complete."""
        if distributed.process_count() == 1:
            return self.complete

        def add_up(payloads: list[bytes]) -> bytes:
            for payload in payloads[1:]:
                self._add(payload)
            return self._packed(with_examples=False)

        total = distributed.reduce_on_primary(
            "evaluation", self._packed(with_examples=True), add_up
        )
        if not distributed.is_primary():
            self.matrix[:] = 0
            self._add(total)
        return self.complete

    def _packed(self, with_examples: bool) -> bytes:
        arrays = {"matrix": self.matrix, "complete": self.complete}
        if with_examples:
            for index, triple in self.examples.items():
                for number, array in enumerate(triple):
                    arrays[f"example/{index}/{number}"] = array
            arrays["names"] = np.array(list(self.sizes), np.str_)
            arrays["sizes"] = np.array(list(self.sizes.values()), np.int64).reshape(-1, 2)
            arrays |= self.findings.arrays()
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    def _add(self, payload: bytes) -> None:
        with np.load(io.BytesIO(payload)) as arrays:
            self.matrix += arrays["matrix"]
            self.complete &= bool(arrays["complete"])
            for name in arrays.files:
                if name.startswith("example/") and name.endswith("/0"):
                    stem = name.removesuffix("0")
                    index = int(stem.split("/")[1])
                    self.examples[index] = tuple(arrays[f"{stem}{n}"] for n in range(3))
            if "names" in arrays:
                sizes = map(tuple, arrays["sizes"].tolist())
                self.sizes |= dict(zip(arrays["names"].tolist(), sizes))
                self.findings.update(arrays)
