"""Checkpoints: what a run needs to go on, written in the background and kept by age and score.

    <workdir>/checkpoints/<step>/state   arrays: nested dicts step, params, batch_stats, memory,
                                         opt_state (orbax)
    <workdir>/checkpoints/<step>/meta    JSON: config, classes, colours, versions, scores, and a
                                         checksum of every array and of itself
    <workdir>/damaged/<step>             what was found damaged when a run was continued

This package is the only place that knows the library underneath (orbax's `CheckpointManager`).

A step's arrays are written once. Saving a step that already exists replaces only its `meta`, and
only to add a score: the state is a function of the step, so there is nothing else to write.
"""

from memseg_jax.checkpoint.arrays import (
    check_same_arrays,
    holds_only_weights,
    read_meta,
    restore_for_inference,
)
from memseg_jax.checkpoint.manager import Checkpointer, write_weights
from memseg_jax.checkpoint.meta import (
    DAMAGED_FOLDER,
    FOLDER,
    DamagedCheckpoint,
    all_steps,
    best_step,
    kept_steps,
    prepare_workdir,
)

__all__ = [
    "DAMAGED_FOLDER",
    "FOLDER",
    "Checkpointer",
    "DamagedCheckpoint",
    "all_steps",
    "best_step",
    "check_same_arrays",
    "holds_only_weights",
    "kept_steps",
    "prepare_workdir",
    "read_meta",
    "restore_for_inference",
    "write_weights",
]
