#!/usr/bin/env bash
# Trains on a spot slice of Cloud TPUs, from your own machine. All that lasts is in a bucket.
#
#   export TPU=my-slice ZONE=us-west4-a BUCKET=gs://my-bucket
#   docs/launch/tpu_pod.sh run       # makes the slice, trains, and goes on by itself on a new slice
#                                    # whenever it is taken back; in the end deletes it
#   docs/launch/tpu_pod.sh log       # follows the log, from anywhere
#   docs/launch/tpu_pod.sh stop      # saves and stops; `run` ends, and the slice stays (`start`)
#   docs/launch/tpu_pod.sh create | start | state | delete    # what `run` does, step by step
#
# Needs: gcloud, logged in, with a project; a bucket in the zone's region in which the machines'
# service account has roles/storage.objectAdmin. `run` may be ended (Ctrl-C) and started again at any
# time, also on another machine: it keeps nothing in mind.
set -euo pipefail

TPU=${TPU:?name of the slice}
ZONE=${ZONE:?zone of the slice}
BUCKET=${BUCKET:?bucket, such as gs://my-bucket}
CONFIG=${CONFIG:-configs/ade20k_resnet50.py}
NAME=$(basename "${CONFIG%%.py*}")
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME}
DATA=${DATA-$BUCKET/data/${NAME%%_*}} # packed (docs/packing.md); empty: the config needs none
CACHE=${CACHE:-$BUCKET/cache}         # compiled programs
FLAGS=${FLAGS---config.model.compute_dtype=bfloat16}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # for a v6e: v2-alpha-tpuv6e
SPOT=${SPOT---spot}                     # empty: at the full price, not taken back
TRIES=${TRIES:-5}                       # starts on one slice, and slices that fail, in a row
# What makes .venv in the folder of the code. The images of TPUs have an older Python.
INSTALL=${INSTALL:-'curl -LsSf https://astral.sh/uv/install.sh | sh &&
    ~/.local/bin/uv venv --python 3.12 .venv &&
    ~/.local/bin/uv pip install --python .venv/bin/python -e ".[tpu,gcs]"'}

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') $*"; }

# ---- The slice ----------------------------------------------------------------------------------

create() {
    # shellcheck disable=SC2086
    gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" $SPOT
}

delete() {
    gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
}

# absent, waiting, ready, taken or failed; fails where gcloud cannot say. Not by `describe`, which
# fails alike for a slice that is not there and for a network that is not.
slice_state() {
    local queued node
    queued=$(gcloud compute tpus queued-resources list --zone="$ZONE" \
        --filter="name~/$TPU\$" --format="value(state.state)") || return
    case $queued in
    "") echo absent ;;
    SUSPENDED) echo taken ;;
    FAILED) echo failed ;;
    ACTIVE) # the request may say so for a while after its machines were taken back
        node=$(gcloud compute tpus tpu-vm list --zone="$ZONE" \
            --filter="name~/$TPU\$" --format="value(state)") || return
        case $node in
        READY) echo ready ;;
        PREEMPTED | TERMINATED | "") echo taken ;;
        *) echo waiting ;;
        esac
        ;;
    *) echo waiting ;;
    esac
}

# ---- Its hosts ----------------------------------------------------------------------------------

on_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --quiet --command="$1"
}

# The code of this folder, as it is now, and what it needs.
install() {
    local archive root
    root=$(cd "$(dirname "$0")/../.." && pwd) && archive=$(mktemp) || return
    tar -czf "$archive" --exclude=__pycache__ -C "$root" memseg_jax configs converters \
        docs/launch setup.cfg pyproject.toml README.md LICENSE &&
        gcloud compute tpus tpu-vm scp "$archive" "$TPU:memseg_jax.tar.gz" \
            --zone="$ZONE" --worker=all --quiet &&
        on_hosts "rm -rf memseg_jax && mkdir memseg_jax && tar -xzf memseg_jax.tar.gz -C memseg_jax &&
            cd memseg_jax && $INSTALL && mkdir .launch"
    local status=$?
    rm -f "$archive"
    return $status
}

start() {
    # Every host finds the others by itself.
    on_hosts "cd memseg_jax && MEMSEG_CACHE='$CACHE' docs/launch/on_host.sh start \
        .venv/bin/python -m memseg_jax.main --config '$CONFIG' ${DATA:+--config.data.packed=$DATA} \
        --workdir '$WORKDIR' --distributed=on $FLAGS"
}

# A word from every host: that of on_host.sh, or "bare".
host_states() {
    on_hosts "if [ -d memseg_jax/.launch ]; then memseg_jax/docs/launch/on_host.sh state
        else echo bare; fi"
}

# What is to be done, given the words of all hosts: install, start, wait, or nothing more, as the run
# has ended, stopped or failed.
verdict() {
    local word all_done=yes again=no
    case " $* " in
    *" running "*) echo wait && return ;;
    *" bare "*) echo install && return ;;
    *" stopped "*) echo stopped && return ;;
    esac
    for word in "$@"; do
        [ "$word" = 0 ] || all_done=no
        case $word in
        idle | lost | 75) again=yes ;;
        # Killed, or ended by the runtime because another process was.
        *) [ "$word" -le 128 ] || again=yes ;;
        esac
    done
    if [ "$all_done" = yes ]; then
        echo ended
    elif [ "$again" = yes ]; then
        echo start
    else
        echo failed
    fi
}

# ---- Going on by itself -------------------------------------------------------------------------

run() {
    local slice words next now before="" starts=0 failures=0 silent=0
    while true; do
        words="" next=wait
        slice=$(slice_state) || slice=unknown
        case $slice in
        absent) next=create ;;
        taken) next=recreate ;;
        failed) next=recreate failures=$((failures + 1)) ;;
        ready)
            failures=0
            if words=$(host_states) && [ -n "$words" ]; then
                # shellcheck disable=SC2086
                silent=0 next=$(verdict $words)
            elif silent=$((silent + 1)) && [ "$silent" -ge "$TRIES" ]; then
                next=recreate
            fi
            ;;
        esac
        words=${words//$'\n'/ }
        now="slice $slice${words:+, hosts $words}: $next"
        [ "$now" = "$before" ] || say "$now"

        case $next in
        create | recreate)
            if [ "$failures" -ge "$TRIES" ]; then
                say "given up: no slice after $failures tries in a row" && return 1
            fi
            starts=0 silent=0
            if [ "$next" = recreate ]; then
                delete || true # the next look tells
            else
                create || failures=$((failures + 1))
            fi
            ;;
        install | start)
            if [ "$starts" -ge "$TRIES" ]; then
                say "given up: it has ended $starts times on this slice" && give_up && return 1
            fi
            starts=$((starts + 1))
            # A host may go away at any moment: the next look tells.
            if [ "$next" = install ] && ! install; then
                say "could not install"
            elif ! start; then
                say "could not start"
            fi
            now=""
            ;;
        ended)
            say "the run has ended: $WORKDIR" && delete && return
            ;;
        stopped)
            say "stopped; the slice is still there: $0 start | delete" && return 75
            ;;
        failed)
            # A host that is taken away makes the others fail a moment before it shows.
            if [ "$now" = "$before" ]; then
                say "the run has failed" && give_up && return 1
            fi
            ;;
        esac
        before=$now
        sleep "${POLL:-60}"
    done
}

# Shows why, and stops the costs.
give_up() {
    on_hosts "tail -n 20 memseg_jax/.launch/log" || true
    delete
}

# The object is replaced as a whole, and what was shown stays its beginning.
follow_log() {
    local shown=0 errors=2 part
    part=$(mktemp)
    exec 4> /dev/null
    while true; do
        gcloud storage cat --range="$shown-" "$WORKDIR/log.txt" > "$part" 2>&$errors || true
        cat "$part"
        shown=$((shown + $(wc -c < "$part")))
        [ "$shown" = 0 ] || errors=4 # which would be that there is nothing new
        sleep "${POLL:-5}"
    done
}

main() {
    case ${1:-} in
    run) run ;;
    create) create ;;
    delete) delete ;;
    start)
        case " $(host_states | tr '\n' ' ') " in *" bare "*) install ;; esac && start
        ;;
    state)
        slice=$(slice_state) && echo "$slice" && { [ "$slice" != ready ] || host_states; }
        ;;
    stop) on_hosts "memseg_jax/docs/launch/on_host.sh stop" ;;
    log) follow_log ;;
    *)
        echo "usage: TPU=NAME ZONE=ZONE BUCKET=gs://NAME $0" \
            "run | log | stop | create | start | state | delete" >&2
        return 2
        ;;
    esac
}

# On one line: bash reads no further, so that this file may change while `run` goes on.
main "$@"; exit
