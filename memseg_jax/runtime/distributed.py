"""Several processes as one run, on JAX's own distributed runtime.

`start` joins the processes. From then on no process ends alone: one that fails leaves a note in the
runtime's key-value store, every process has a thread that looks for such notes, and all end with
the same words and the same exit status. A process that dies without a word is noticed by the
runtime's heartbeat. `reduce_on_primary` is how the processes exchange what is not an array of the
training.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from memseg_jax.errors import Stopped, UserError

log = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")
# A process without a sign of life for so many seconds counts as dead. More is needed where
# processes are suspended at times, as under a debugger.
HEARTBEAT_SECONDS = int(os.environ.get("MEMSEG_HEARTBEAT_SECONDS") or 30)
_LOOK_EVERY = 1.0  # seconds between two looks for notes
_LOOK_AT_LEAST_EVERY = 10.0  # the same where looking failed
# How long a process that ends with the others waits for them: they may be finishing a save.
_FAREWELL_SECONDS = 40
_GOES_LAST_SECONDS = 1  # enough for the others to exit after the farewell
_LAST_WORDS_SECONDS = 3  # the same where one of them is known to be gone
_CHUNK = 2**20  # bytes in one value of the key-value store
_NOTES = "memseg_jax/notes/"
_MEETINGS = "memseg_jax/meetings/"
_CALLED_OFF = "memseg_jax/called_off/"
_STOP = "memseg_jax/stop/"
# What the messages of a collective operation have in them whose other end is gone.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "socket closed", "heartbeat")


class _Run:
    """What this process knows of the run; it is alone until `start`."""

    def __init__(self) -> None:
        self.client: Any = None
        self.index = 0
        self.count = 1
        self.finished = threading.Event()
        self.leaving = threading.Lock()
        self.stop_requested = threading.Event()
        self.calls: Counter[str] = Counter()
        self.last_meeting = ""


_run = _Run()


# ---- Joining ------------------------------------------------------------------------------------


def start(
    choice: str = "auto",
    coordinator_address: str | None = None,
    num_processes: str | None = None,
    process_id: str | None = None,
) -> None:
    """Joins the processes of a run; to be called before anything asks JAX for a device.

    Args:
        choice: "auto": join if there is a `coordinator_address`, or JAX knows the cluster (TPU
            pod, Slurm, Open MPI, GKE) and it runs more than one process; "on": fail if it cannot;
            "off": this process is alone.
        coordinator_address: "host:port" of process 0; the port must be free there.
        num_processes: how many there are.
        process_id: of this one, from 0.

    Raises:
        UserError: flags that do not fit, an unknown cluster, or no answer from the others.
    """
    if choice not in CHOICES:
        raise UserError(f"--distributed={choice}: expected one of {', '.join(CHOICES)}")
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    explicit = _check_flags(choice, given)
    if choice == "off" or not (explicit or _cluster_found(choice == "on")):
        return
    import jax
    from jax._src import distributed as runtime  # the key-value store has no public name

    # JAX would take SIGTERM for itself, in all modes: `stopping` does that for training alone.
    with contextlib.suppress(AttributeError):  # a JAX without the service
        jax.config.update("jax_enable_preemption_service", False)
    arguments = explicit and explicit | {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator_address or "the coordinator that the cluster names"
        raise UserError(
            f"the processes could not be joined through {where}: {error}. Every process needs the "
            "same coordinator_address and num_processes and its own process_id; process 0 must "
            "run on the host of the address, with that port free and open to the others."
        ) from error
    _run.client = runtime.global_state.client
    _run.index = runtime.global_state.process_id
    _run.count = runtime.global_state.num_processes
    threading.Thread(target=_look_for_notes, name="notes", daemon=True).start()
    log.info("process %d of %d", _run.index, _run.count)


def _check_flags(choice: str, given: dict[str, str | None]) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` that the flags give."""
    present = [name for name, value in given.items() if value is not None]
    if not present:
        return {}
    if choice == "off":
        raise UserError(f"--{present[0]} does not go with --distributed=off")
    missing = [name for name in given if name not in present]
    if missing:
        raise UserError(
            f"--{present[0]} without --{missing[0]}: give all of "
            f"{', '.join('--' + name for name in given)}, or none where JAX knows the cluster"
        )
    address = given["coordinator_address"]
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT")
    for name in ("num_processes", "process_id"):
        if not given[name].isdecimal():
            raise UserError(f"--{name}={given[name]}: expected a whole number")
    count, index = int(given["num_processes"]), int(given["process_id"])
    if index >= count:
        raise UserError(
            f"--process_id={index}: expected 0 to {count - 1}, as --num_processes is {count}"
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _cluster_found(required: bool) -> bool:
    """Whether JAX finds a cluster around this process, and more than one process in it."""
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return required or cluster.get_process_count() > 1
    if required:
        raise UserError(
            "--distributed=on: JAX knows no cluster here (it knows TPU pods, Slurm, Open MPI and "
            "GKE). Give --coordinator_address, --num_processes and --process_id."
        )
    return False


# ---- Who is who, and exchanging bytes -----------------------------------------------------------


def is_primary() -> bool:
    """Whether this is the process that prints, and writes what there is once."""
    return _run.index == 0


def process_index() -> int:
    """Number of this process."""
    return _run.index


def process_count() -> int:
    """Number of processes."""
    return _run.count


def reduce_on_primary(name: str, payload: bytes, function: Callable[[list[bytes]], bytes]) -> bytes:
    """Every process gives something, process 0 makes one thing of it, every process gets that.

    All processes must call it in the same order. It waits as long as it takes.

    Args:
        name: of what is exchanged.
        payload: of this process.
        function: called on process 0 with the payloads of all, in their order.

    Returns:
        What `function` returned on process 0.
    """
    if _run.client is None:
        return function([payload])
    _run.calls[name] += 1
    number = _run.calls[name]
    prefix = f"memseg_jax/merge/{name}/{number}"
    if not is_primary():
        _put(f"{prefix}/{_run.index}", payload)
        return _get(f"{prefix}/result")
    payloads = [payload, *(_get(f"{prefix}/{other}") for other in range(1, _run.count))]
    if number > 1:  # nobody gives anything before it has the result of the time before
        _run.client.key_value_delete(f"memseg_jax/merge/{name}/{number - 1}/")
    result = function(payloads)
    _put(f"{prefix}/result", result)
    return result


def _put(key: str, value: bytes) -> None:
    chunks = [value[i : i + _CHUNK] for i in range(0, len(value), _CHUNK)]
    for number, chunk in enumerate(chunks):
        _run.client.key_value_set_bytes(f"{key}/{number}", chunk)
    _run.client.key_value_set_bytes(f"{key}/count", str(len(chunks)).encode())


def _get(key: str) -> bytes:
    count = int(_wait_for(f"{key}/count"))
    return b"".join(_wait_for(f"{key}/{number}") for number in range(count))


def _wait_for(key: str, in_vain: Callable[[], None] = lambda: None) -> bytes:
    """The value of a key, as soon as there is one; after each second without, calls `in_vain`."""
    while True:  # whether the others still live is looked after by the thread and the heartbeat
        try:
            return _run.client.blocking_key_value_get_bytes(key, 1000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        in_vain()


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    reduce_on_primary(name, b"", lambda payloads: b"")


def meet(key: str, seconds: float, called_off: str) -> None:
    """Returns when every process has come here, unless one of them calls it off.

    Unlike `wait_for_all`, it may be called by any thread, one at a time in a process.

    Args:
        key: of this meeting, another one each time.
        seconds: after which it is given up.
        called_off: the name that `call_off` is given.

    Raises:
        TimeoutError: another process has not come.
        RuntimeError: it was called off.
    """
    ends = time.monotonic() + seconds

    def look(other: int) -> None:
        if _run.client.key_value_dir_get(f"{_CALLED_OFF}{called_off}/"):
            raise RuntimeError("another process could not do its part, and says why")
        if time.monotonic() > ends:
            raise TimeoutError(f"process {other} did not come within {seconds:.0f} s")

    _run.client.key_value_set_bytes(f"{_MEETINGS}{key}/{_run.index}", b"here")
    for other in range(_run.count):
        _wait_for(f"{_MEETINGS}{key}/{other}", functools.partial(look, other))
    if is_primary() and _run.last_meeting:  # which all have left
        _run.client.key_value_delete(f"{_MEETINGS}{_run.last_meeting}/")
    _run.last_meeting = key


def call_off(name: str) -> None:
    """Lets the others not wait in `meet` for this process."""
    if _run.client is not None:
        _run.client.key_value_set(f"{_CALLED_OFF}{name}/{_run.index}", "", allow_overwrite=True)


def check_same(name: str, values: dict[str, Any]) -> None:
    """Refuses to go on unless all processes have the same values.

    Args:
        name: of the exchange.
        values: plain values by what they are, in words.

    Raises:
        UserError: on process 0; it names the first that differ.
    """

    def compare(payloads: list[bytes]) -> bytes:
        first, *others = map(json.loads, payloads)
        for index, other in enumerate(others, 1):
            for what in first:
                if other.get(what) != first[what]:
                    raise UserError(
                        f"process {index} differs from process 0 in {what}: {other.get(what)} "
                        f"there, {first[what]} here. All processes need the same command, code "
                        "and data, and a --workdir that all of them see (a shared file system)."
                    )
        return b""

    reduce_on_primary(name, json.dumps(values).encode(), compare)


def on_primary(name: str, function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 alone; every process gets what it returned.

    If it raises, process 0 ends, and the others with it.

    Args:
        name: of the exchange.
        function: returns plain JSON values.
    """
    if _run.client is None:
        return function()
    payload = json.dumps(function()).encode() if is_primary() else b""
    return json.loads(reduce_on_primary(name, payload, lambda payloads: payloads[0]))


# ---- Ending together ----------------------------------------------------------------------------


def failed(error: BaseException) -> None:
    """Tells the other processes that this one ends, and why.

    To be called where an exception is on its way out, before anything is closed: closing may wait
    for the others. If another process is gone already, it does not return.
    """
    if _run.client is None or isinstance(error, Stopped):
        return
    lost = _is_lost(error)
    if lost:
        time.sleep(3 * _LOOK_EVERY)  # it may have left a note: then the thread ends this process
        print(
            f"error: process {_run.index} of {_run.count} lost the connection to another process, "
            "which has probably ended; the output of that one says more. Start all processes "
            "again with the same commands: a training goes on from its last checkpoint. "
            f"({_words(error)})",
            file=sys.stderr,
        )
    _leave_note(error)
    if lost:
        leave(1, _LAST_WORDS_SECONDS)


def end_all(error: BaseException) -> NoReturn:
    """Ends this process, from any thread, and the others; nothing is closed."""
    print(_words(error), file=sys.stderr)
    if _run.client is not None:
        _leave_note(error)
    leave(_status(error), _LAST_WORDS_SECONDS)


def _leave_note(error: BaseException) -> None:
    note = {"status": _status(error), "message": _words(error)}
    with contextlib.suppress(Exception):  # there is one already, or nobody can be reached
        _run.client.key_value_set(f"{_NOTES}{_run.index}", json.dumps(note))


def _is_lost(error: BaseException) -> bool:
    """Whether an exception only says that another process cannot be reached."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)


def _status(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return Stopped.EXIT_STATUS
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _words(error: BaseException) -> str:
    if isinstance(error, UserError | Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]


def request_stop(number: int) -> None:
    """Tells all processes that the run is to stop.

    Args:
        number: of the signal.
    """
    _run.stop_requested.set()
    if _run.client is None:
        return
    _run.client.key_value_set(f"{_STOP}{_run.index}", str(number), allow_overwrite=True)


def stop_requested() -> threading.Event:
    """Is set soon after some process was asked to stop."""
    return _run.stop_requested


def finish(status: int) -> None:
    """Ends this process together with the others; returns if it is alone.

    Args:
        status: the exit status; if it is an error, the others have been told.
    """
    if _run.client is None:
        return
    if status in (0, Stopped.EXIT_STATUS):
        wait_for_all("end")
        _run.finished.set()
        import jax

        jax.distributed.shutdown()
        _run.client, _run.index, _run.count = None, 0, 1
        return
    leave(status)


def leave(status: int, seconds: float = _FAREWELL_SECONDS) -> NoReturn:
    """Ends this process at once, after the others have had some seconds to learn why."""
    with _run.leaving:  # never given back
        # The log may be a file in a bucket that cannot be reached.
        closing = threading.Thread(target=logging.shutdown, daemon=True)
        closing.start()
        closing.join(_LAST_WORDS_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        if _run.client is not None:
            with contextlib.suppress(Exception):
                _run.client.wait_at_barrier("memseg_jax/farewell", int(seconds * 1000))
                # The runtime is in process 0: whoever still runs when it goes is aborted.
                if is_primary():
                    time.sleep(_GOES_LAST_SECONDS)
        # Threads of collective operations may wait for ever for processes that are gone.
        os._exit(status)


def _look_for_notes() -> None:
    """Looks for notes until the run is finished, whatever goes wrong in between."""
    pause = _LOOK_EVERY
    while not _run.finished.wait(pause):
        try:
            notes = _run.client.key_value_dir_get(_NOTES)
            if not _run.stop_requested.is_set() and _run.client.key_value_dir_get(_STOP):
                _run.stop_requested.set()
        except Exception:
            # A moment's trouble, or process 0 is gone: then the runtime ends this process.
            pause = min(2 * pause, _LOOK_AT_LEAST_EVERY)
            continue
        pause = _LOOK_EVERY
        for key, text in notes:
            index, note = int(key.rpartition("/")[2]), json.loads(text)
            if index != _run.index:
                log.error(
                    "error: process %d of %d has ended: %s\nprocess %d ends with it",
                    index,
                    _run.count,
                    note["message"],
                    _run.index,
                )
                leave(note["status"])
