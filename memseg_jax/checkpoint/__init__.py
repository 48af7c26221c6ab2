"""Checkpoints: what a run needs to go on, written in the background and kept by age and score.

    <workdir>/checkpoints/<step>/state   arrays: nested dicts step, params, batch_stats, memory,
                                         opt_state (orbax)
    <workdir>/checkpoints/<step>/meta    JSON: config, classes, colours, versions, and a checksum
                                         of every array and of itself
    <workdir>/scores.json                scores of the steps that were evaluated
    <workdir>/damaged/<step>             what was found damaged when a run was continued
    <workdir>/run.lock                   which process trains here

This package is the only place that knows the library underneath (orbax's checkpointers).

A checkpoint is written once: the state is a function of the step.
"""

from memseg_jax.checkpoint.arrays import check_same_arrays, restore_for_inference
from memseg_jax.checkpoint.lock import RunLock
from memseg_jax.checkpoint.manager import Checkpointer, write_weights
from memseg_jax.checkpoint.meta import (
    check_class_names,
    check_same_run,
    holds_only_weights,
    make_meta,
    read_meta,
    recorded_config,
)
from memseg_jax.checkpoint.scores import best_step, kept_steps, read_scores
from memseg_jax.checkpoint.steps import (
    DAMAGED_FOLDER,
    FOLDER,
    DamagedCheckpoint,
    all_steps,
    prepare_workdir,
)

__all__ = [
    "DAMAGED_FOLDER",
    "FOLDER",
    "Checkpointer",
    "DamagedCheckpoint",
    "RunLock",
    "all_steps",
    "best_step",
    "check_class_names",
    "check_same_arrays",
    "check_same_run",
    "holds_only_weights",
    "kept_steps",
    "make_meta",
    "prepare_workdir",
    "read_meta",
    "read_scores",
    "recorded_config",
    "restore_for_inference",
    "write_weights",
]
