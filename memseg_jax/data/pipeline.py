"""From a source to the batches of a training run: order, augmentation, batching, prefetch.

Every training sample is a pure function of (seed, epoch, position in the epoch), so the stream has
no state: its position is the step number. A run resumed at any step, with any number of worker
processes, threads or hosts, sees the samples the uninterrupted run would have seen.
"""

import functools
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from memseg_jax.data import IGNORE_LABEL, transforms
from memseg_jax.errors import UserError
from memseg_jax.runtime.text import first_few

# `TrainSamples` has no end; grain wants a length.
_ENDLESS = 2**50


def steps_per_epoch(num_images: int, batch_size: int, replica_groups: int = 1) -> int:
    """Counts the steps of an epoch as the PyTorch reference does.

    There each of `replica_groups` processes gets ceil(num_images / replica_groups) images and drops
    its last incomplete batch.

    Args:
        num_images: Size of the training set.
        batch_size: Images in a global batch.
        replica_groups: Processes of the reference's run; divides `batch_size`.

    Returns:
        The number of steps, at least 1.
    """
    per_group = -(-num_images // replica_groups)
    return max(1, per_group // (batch_size // replica_groups))


def samples_per_epoch(source: Any) -> int:
    """Returns how many samples of a source an epoch of training has: all, or one of each group."""
    return len(getattr(source, "groups", ())) or len(source)


def _generator(*parts: Any) -> np.random.Generator:
    """Returns a generator that is a pure function of `parts`, the same on every machine."""
    text = " ".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@functools.lru_cache(maxsize=4)  # threads work ahead into the next epoch
def _epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return _generator("order", seed, epoch).permutation(num_images)


class TrainSamples:
    """The endless sequence of augmented training samples of one process, by random access.

    Item i of a process that holds b samples of each global batch is sample i % b of its part of
    step i // b. The parts of the processes are consecutive, so that together they form the same
    global batch whatever their number.
    """

    def __init__(self, source: Any, config: Any, process_index: int = 0, process_count: int = 1):
        """Checks the sizes; reads nothing.

        Args:
            source: Where images come from (see `memseg_jax.data`).
            config: The whole config; `seed`, `replica_groups`, `augment` and `train.batch_size` are
                read.
            process_index: Number of this process.
            process_count: Number of processes that share each global batch.

        Raises:
            UserError: If the processes cannot share the batch evenly, or there are no images.
        """
        batch_size = int(config.train.batch_size)
        if batch_size % process_count:
            raise UserError(
                f"config.train.batch_size is {batch_size}; expected a multiple of the number of "
                f"processes, which is {process_count}"
            )
        if not len(source):
            raise UserError("the training split is empty: there is nothing to train on")
        self._source = source
        self._expect = getattr(source, "expect", None)
        self._seed = int(config.seed)
        self._augment = config.augment
        self._batch_size = batch_size
        self._process_index = process_index
        self._per_process = batch_size // process_count
        self._samples = samples_per_epoch(source)
        # Where every group ends, counted in samples; None: every sample is its own.
        groups = getattr(source, "groups", ())
        self._ends = np.cumsum([0, *groups]) if groups else None
        self._steps_per_epoch = steps_per_epoch(self._samples, batch_size, config.replica_groups)

    def __len__(self) -> int:
        return _ENDLESS

    def locate(self, item: int) -> tuple[int, int, int]:
        """Returns (epoch, position in the epoch, index in the source) of an item."""
        step, k = divmod(item, self._per_process)
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        offset = self._process_index * self._per_process + k
        position = step_in_epoch * self._batch_size + offset
        # Rounding up per replica group can ask for more images than there are.
        order = _epoch_order(self._seed, epoch, self._samples)
        index = int(order[position % self._samples])
        if self._ends is not None:
            first, end = self._ends[index : index + 2]
            index = int(_generator("group", self._seed, epoch, position).integers(first, end))
        return epoch, position, index

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        """Reads and augments one sample.

        Args:
            item: Position in this process's sequence.

        Returns:
            `image` float32 `[height, width, 3]`, `label` uint8 `[height, width]` and `index`, an
            int64 scalar: the sample's index in the source.

        Raises:
            UserError: If the source cannot read the sample.
        """
        epoch, position, index = self.locate(int(item))
        if item % self._per_process == 0 and self._expect:
            # The rest of the batch, and no more: the next one may be another worker's.
            self._expect([self.locate(item + k)[2] for k in range(1, self._per_process)])
        rng = _generator("augment", self._seed, epoch, position)
        try:
            result = transforms.train_transform(self._source[index], rng, self._augment)
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"While preparing {self._source.describe(index)}.")
            raise
        return result | {"index": np.array(index, np.int64)}


class Batches:
    """A closable iterator over batches; also a context manager. `train_batches` makes it."""

    def __init__(self, iterator: Any, in_shared_memory: bool = False):
        self._iterator = iterator
        self._in_shared_memory = in_shared_memory

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
            if not self._in_shared_memory:
                return batch
            # Batches of worker processes lie in shared memory. JAX may keep such an array for
            # longer than the program lives; a copy lets go of the shared memory at once.
            return {name: np.array(value) for name, value in batch.items()}
        except StopIteration:
            self.close()
            raise
        except Exception as error:
            self.close()
            cause = _user_error(error)
            if cause is None:
                raise
            # The frames of workers and of grain say nothing to the user.
            raise UserError(*cause.args) from None

    def close(self) -> None:
        """Ends threads and worker processes and frees their memory. May be called repeatedly."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()
            # grain leaves batches that nobody took in reference cycles. Shared memory that is not
            # freed before the program ends is reported as leaked.
            del iterator
            if self._in_shared_memory:
                gc.collect()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()


def _user_error(error: BaseException | None) -> UserError | None:
    """Finds the UserError behind an exception of grain."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def train_batches(
    source: Any,
    config: Any,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Prepares the batches of steps `start_step` .. `start_step + num_steps - 1`, ahead of use.

    With `config.data.workers` > 0, worker processes start: the calling program needs the usual
    `if __name__ == "__main__"` guard, and its main module is imported in each worker.

    Args:
        source: Where images come from (see `memseg_jax.data`).
        config: The whole config. `data.workers`, `data.threads` and `data.prefetch` (batches ahead)
            only change how fast it goes; for the rest see `TrainSamples`.
        start_step: Number of the first step, from 0.
        num_steps: Number of steps.
        process_index: Number of this process.
        process_count: Number of processes that share each global batch.

    Returns:
        An iterator over `dict(image, label, index)`: float32 `[batch, height, width, 3]`, uint8
        `[batch, height, width]`, int64 `[batch]`, where batch is this process's part of the global
        batch. Close it, or use it in a `with` statement. A UserError from reading a sample is
        raised by `next`, with its own message.

    Raises:
        UserError: If a config field does not fit.
    """
    data = config.data
    samples = TrainSamples(source, config, process_index, process_count)
    if num_steps <= 0:
        return Batches(None)
    workers = min(data.workers, num_steps)
    threads = 0 if workers else min(data.threads, data.prefetch)
    batches = grain.MapDataset.source(samples).batch(config.train.batch_size // process_count)
    batches = batches[start_step : start_step + num_steps].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch if threads else 0)
    )
    if workers:
        # grain reads absl flags; programs that do not use absl have not parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=-(-data.prefetch // workers)
            ),
            worker_init_fn=_start_worker,
        )
    return Batches(iter(batches), in_shared_memory=workers > 0)


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Makes a worker process end with its parent, and only then."""
    del worker_index, worker_count
    # Ctrl-C reaches the whole process group; the parent closes its workers without their help.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow_parent() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed cannot stop its workers

    threading.Thread(target=follow_parent, name="follow-parent", daemon=True).start()


def check_batch(
    batch: dict[str, np.ndarray], num_classes: int, describe: Callable[[int], str]
) -> None:
    """Refuses a batch with label values that are not classes.

    Sources check what they read; this stands between any source and the loss, where a wrong value
    would be clamped or wrapped silently.

    Args:
        batch: `label` uint8 `[batch, height, width]` and `index` `[batch]`.
        num_classes: Allowed are 0 .. num_classes - 1 and `IGNORE_LABEL`.
        describe: Returns the files behind a sample of the source, given its index.

    Raises:
        UserError: Names the samples and their values.
    """
    label = batch["label"]
    wrong = (label >= num_classes) & (label != IGNORE_LABEL)
    if not wrong.any():
        return
    problems = []
    for position in np.flatnonzero(wrong.any((1, 2))):
        values, counts = np.unique(label[position][wrong[position]], return_counts=True)
        found = first_few([f"{v} ({n} pixels of the crop)" for v, n in zip(values, counts)])
        problems.append(f"{describe(int(batch['index'][position]))}: {', '.join(found)}")
    raise UserError(
        f"labels outside the allowed values 0..{num_classes - 1} and {IGNORE_LABEL} (ignored):\n  "
        + "\n  ".join(problems)
        + "\nCorrect the files, or set config.data.class_names and config.data.ignore_label to "
        "what they contain; --mode check_data lists every bad file."
    )
