#!/usr/bin/env bash
#SBATCH --job-name=memseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=memseg-%j.log
# Trains on Slurm, one process a GPU, and goes on by itself after the time limit:
#
#   sbatch docs/launch/slurm.sh
#
# Needs: the repository with its environment in .venv, DATA and WORKDIR on a shared file system.
# Two minutes before the limit Slurm sends SIGUSR1 to all processes: they finish the step, save, and
# end with status 75; then the job puts itself into the queue again. After a preemption Slurm does
# that. The tasks of a host share all its GPUs, JAX gives each its own: do not bind them
# (--gpus-per-task).
set -uo pipefail

CONFIG=${CONFIG:-configs/ade20k_resnet50.py}
DATA=${DATA:-$HOME/data}
WORKDIR=${WORKDIR:-$HOME/runs/ade20k_resnet50}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

# No --kill-on-bad-exit: the processes end together by themselves, after saving.
srun --kill-on-bad-exit=0 .venv/bin/python -m memseg_jax.main \
    --config "$CONFIG" --config.data.root="$DATA" --config.model.compute_dtype=bfloat16 \
    --workdir "$WORKDIR" --distributed=on
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
