#!/usr/bin/env bash
# Trains on hosts that are reached by ssh, one process a host with all its GPUs.
#
#   HOSTS="gpu1 gpu2" docs/launch/ssh_hosts.sh start    # also to go on
#   HOSTS="gpu1 gpu2" docs/launch/ssh_hosts.sh log | stop
#
# Needs: ssh without a password; the repository with its environment in .venv, DATA and WORKDIR
# under the same names on all hosts (a shared file system); PORT of the first host open to the
# others.
# shellcheck disable=SC2029  # these variables are meant to be those of this side
set -euo pipefail

read -ra HOSTS <<< "${HOSTS:?names of the hosts, the first one coordinates}"
CONFIG=${CONFIG:-configs/ade20k_resnet50.py}
DATA=${DATA:-/shared/data}
WORKDIR=${WORKDIR:-/shared/runs/ade20k_resnet50}
REPOSITORY=${REPOSITORY:-$PWD}
PORT=${PORT:-29500}

case ${1:-} in
start)
    for index in "${!HOSTS[@]}"; do
        ssh "${HOSTS[$index]}" "cd '$REPOSITORY' && (setsid nohup .venv/bin/python \
            -m memseg_jax.main --config '$CONFIG' --config.data.root='$DATA' \
            --config.model.compute_dtype=bfloat16 --workdir '$WORKDIR' \
            --coordinator_address='${HOSTS[0]}:$PORT' --num_processes=${#HOSTS[@]} \
            --process_id=$index > train-$index.log 2>&1 < /dev/null & \
            echo \$! > train-$index.pid)"
    done
    ;;
log)
    ssh "${HOSTS[0]}" "tail -n 20 -f '$REPOSITORY/train-0.log'"
    ;;
stop)
    # One is enough: all finish the step, save, and end with status 75.
    ssh "${HOSTS[0]}" "kill -TERM \$(cat '$REPOSITORY/train-0.pid')"
    ;;
*)
    echo "usage: HOSTS='HOST ...' $0 start | log | stop" >&2
    exit 2
    ;;
esac
