#!/usr/bin/env bash
# Trains on a Cloud TPU slice: the same command on every host, from your own machine.
#
#   TPU=my-slice ZONE=us-west4-a docs/launch/tpu_pod.sh install    # once
#   TPU=my-slice ZONE=us-west4-a docs/launch/tpu_pod.sh start      # also to go on
#   TPU=my-slice ZONE=us-west4-a docs/launch/tpu_pod.sh log | stop
#
# Needs: gcloud, logged in; a slice made by `gcloud compute tpus tpu-vm create`; the repository's
# address in REPOSITORY for `install`; DATA and WORKDIR on a file system that all hosts have
# mounted (Filestore).
set -euo pipefail

TPU=${TPU:?name of the slice}
ZONE=${ZONE:?zone of the slice}
CONFIG=${CONFIG:-configs/ade20k_resnet50.py}
DATA=${DATA:-/mnt/shared/data}
WORKDIR=${WORKDIR:-/mnt/shared/runs/ade20k_resnet50}

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="${2:-all}" --command="$1"
}

case ${1:-} in
install)
    on_all_hosts "git clone --depth=1 '${REPOSITORY:?address of the repository}' memseg_jax &&
        cd memseg_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    ;;
start)
    # Every host finds the others by itself. setsid: the training outlives this connection.
    on_all_hosts "cd memseg_jax && (setsid nohup .venv/bin/python -m memseg_jax.main \
        --config $CONFIG --config.data.root=$DATA --config.model.compute_dtype=bfloat16 \
        --workdir $WORKDIR --distributed=on \
        > train.log 2>&1 < /dev/null & echo \$! > train.pid)"
    ;;
log)
    on_all_hosts "tail -n 20 -f memseg_jax/train.log" 0
    ;;
stop)
    # Finishes the step, saves, and ends with status 75; `start` goes on from there.
    on_all_hosts "kill -TERM \$(cat memseg_jax/train.pid)"
    ;;
*)
    echo "usage: TPU=NAME ZONE=ZONE $0 install | start | log | stop" >&2
    exit 2
    ;;
esac
