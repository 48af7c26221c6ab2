#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a slice:
#
#   docs/launch/on_host.sh start COMMAND...    # in the background, unless it runs there already
#   docs/launch/on_host.sh state    # idle, running, stopped, lost, or the exit status of COMMAND
#   docs/launch/on_host.sh stop
#
# "stopped" has ended because of `stop`; "lost" has ended without a word, as when the host restarts.
# COMMAND runs in the folder of the code; what it prints is in .launch/log there.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .launch

# Whoever runs holds this lock, and gives it up however it ends; a process number would be used again.
exec 9>> .launch/lock

case ${1:-} in
start)
    shift
    flock --timeout 5 9 || exit 0
    rm -f .launch/status .launch/stopped
    # A session of its own outlives this connection. A host that shuts down sends SIGTERM to this
    # shell, too: it waits for the command and writes down how it ended.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM
        (echo "$BASHPID" > .launch/pid; exec "$@")
        echo "$?" > .launch/status' run "$@" >> .launch/log 2>&1 < /dev/null &
    ;;
state)
    if ! flock --timeout 0.2 9; then
        echo running
    elif [ "$(cat .launch/status 2> /dev/null)" != 0 ] && [ -e .launch/stopped ]; then
        echo stopped
    elif [ -s .launch/status ]; then
        cat .launch/status
    elif [ -e .launch/pid ]; then
        echo lost
    else
        echo idle
    fi
    ;;
stop)
    touch .launch/stopped
    if ! flock --timeout 0.2 9; then
        kill -TERM "$(cat .launch/pid)"
    fi
    ;;
*)
    echo "usage: $0 start COMMAND... | state | stop" >&2
    exit 2
    ;;
esac
