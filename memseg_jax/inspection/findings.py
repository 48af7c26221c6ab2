"""All that is found out about the memory of a checkpoint, and its file of arrays."""

import dataclasses
import io
from typing import Any

import numpy as np

from memseg_jax.inspection import similarity
from memseg_jax.inspection.course import Course, course_of
from memseg_jax.inspection.looking import Look
from memseg_jax.inspection.maps import FlatMap, maps_of
from memseg_jax.inspection.similarity import Agreement
from memseg_jax.inspection.worth import AS_TRAINED, Worth
from memseg_jax.models.segmentor import Segmentor
from memseg_jax.runtime import files
from memseg_jax.scoring.memory_history import MemoryRecord


@dataclasses.dataclass(frozen=True)
class Holding:
    """What the memory holds of every class.

    Attributes:
        memory: float32 [classes, ...], as the method keeps it.
        rows: float32 [classes, rows of a class, channels], the features that it stands for.
        seen: bool [classes], whether anything was stored.
        norms: float64 [classes, rows of a class].
        vectors: float64 [classes, channels], see `similarity.class_vectors`.
    """

    memory: np.ndarray
    rows: np.ndarray
    seen: np.ndarray
    norms: np.ndarray
    vectors: np.ndarray

    @property
    def drawn(self) -> bool:
        """Whether the rows are drawn from what is kept, instead of being it."""
        return self.memory.shape != self.rows.shape


def holding_of(model: Segmentor, memory: np.ndarray) -> Holding:
    """What a memory holds.

    Args:
        model: whose memory it is.
        memory: [classes, ...].
    """
    rows = np.asarray(model.rows_of(memory), np.float32)
    seen = np.any(memory != model.initial_memory(), axis=tuple(range(1, memory.ndim)))
    norms = np.linalg.norm(rows.astype(np.float64), axis=-1)
    return Holding(np.asarray(memory), rows, seen, norms, similarity.class_vectors(rows))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was looked at.

    Attributes:
        name: for its heading.
        image: RGB uint8 [height, width, 3].
        look: what it reads.
        pixel: row and column to show first.
    """

    name: str
    image: np.ndarray
    look: Look
    pixel: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is shown about the memory of a checkpoint.

    Attributes:
        class_names: one per class.
        palette: uint8 [classes, 3].
        step: of the checkpoint.
        split: that the scores are of.
        holding: what the memory holds.
        record: what was kept at this step, or the last one before it; None: nothing was.
        course: how the rows moved.
        similarity: float64 [classes, classes], cosine of the classes' rows.
        order: int [classes], alike classes side by side.
        agreement: of similarity and confusion.
        maps: rows and pixels in two dimensions.
        map_rows: int [rows], the classes of the rows on the maps.
        map_pixels: int [pixels], the classes of the pixels on the maps.
        worth: scores with this and other memories.
        picture: that was looked at; None: none was.
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    step: int
    split: str
    holding: Holding
    record: MemoryRecord | None
    course: Course
    similarity: np.ndarray
    order: np.ndarray
    agreement: Agreement
    maps: list[FlatMap]
    map_rows: np.ndarray
    map_pixels: np.ndarray
    worth: Worth
    picture: Picture | None = None


def find(
    model: Segmentor,
    memory: np.ndarray,
    records: list[MemoryRecord],
    features: tuple[np.ndarray, np.ndarray],
    worth: Worth,
    **about: Any,
) -> Findings:
    """Puts together what can be said about a memory.

    Args:
        model: whose memory it is.
        memory: [classes, ...].
        records: what was kept at evaluations, up to this checkpoint's.
        features: pixels and their classes, see `samples.sample_features`.
        worth: see `worth.worth_of`.
        **about: the fields of `Findings` that say what it is about: class_names, palette, step,
            split, picture.
    """
    holding = holding_of(model, memory)
    matrix = worth.matrices[AS_TRAINED]
    alike = similarity.cosine(holding.vectors)

    def vectors_of(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        then = holding_of(model, memory)
        return then.vectors, then.seen

    own = memory.reshape(len(memory), -1, memory.shape[-1])  # [classes, rows as they are kept, n]
    shown = holding.seen[:, None] & np.any(own != 0, axis=-1)
    pixels, pixel_classes = features
    return Findings(
        holding=holding,
        record=records[-1] if records else None,
        course=course_of(records, vectors_of),
        similarity=alike,
        order=similarity.order_of(alike, holding.seen),
        agreement=similarity.agreement(alike, matrix, holding.seen),
        maps=maps_of(own[shown], model.in_memory(pixels)) if shown.any() else [],
        map_rows=np.nonzero(shown)[0],
        map_pixels=pixel_classes,
        worth=worth,
        **about,
    )


def save_arrays(findings: Findings, path: files.Place) -> None:
    """Writes memory.npz: the numbers behind the page, by names that `docs/memory_map.md` lists.

    Raises:
        UserError: it cannot be written.
    """
    course, record = findings.course, findings.record
    arrays: dict[str, Any] = {
        "class_names": np.array(findings.class_names, np.str_),
        "step": np.int64(findings.step),
        "memory": findings.holding.memory,
        "rows": findings.holding.rows,
        "seen": findings.holding.seen,
        "norms": findings.holding.norms,
        "similarity": findings.similarity,
        "order": findings.order,
        "correlation": np.float64(findings.agreement.correlation),
        "map_row_classes": findings.map_rows,
        "map_pixel_classes": findings.map_pixels,
        "history_steps": course.steps,
        "history_norms": course.norms,
        "history_moved": course.moved,
        "history_likeness": course.likeness,
    }
    if record is not None:
        arrays |= {"pixels": record.pixels, "steps": record.steps, "ages": record.ages}
    for name, matrix in findings.worth.matrices.items():
        arrays[f"confusion_{name.replace(' ', '_')}"] = matrix
    for flat in findings.maps:
        name = "".join(c for c in flat.name.lower() if c.isalnum() or c == " ").replace(" ", "_")
        arrays |= {f"map_{name}_rows": flat.rows, f"map_{name}_pixels": flat.pixels}
    if picture := findings.picture:
        found = picture.look.at(*picture.pixel)
        arrays |= {
            "pixel": np.array(found.pixel),
            "pixel_weights": found.weights,
            "pixel_prediction": found.prediction,
            "pixel_memory_attention": found.memory_attention,
        }
        if found.image_attention is not None:
            arrays["pixel_image_attention"] = found.image_attention
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    with files.replacing(path) as temporary:
        temporary.write_bytes(packed.getvalue())
