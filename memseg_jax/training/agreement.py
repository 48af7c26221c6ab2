"""Whether the processes of a run agree, checked before it starts."""

import time
from typing import Any

from memseg_jax.checkpoint.meta import versions
from memseg_jax.runtime import distributed, files
from memseg_jax.runtime.plain import flatten, plain, show


def check_processes_agree(config: Any, fingerprint: str, workdir: files.Place | None) -> None:
    """Refuses a run whose processes have different configs, data or workdirs.

    Args:
        config: the config of this process.
        fingerprint: `Source.fingerprint()` of the training images of this process.
        workdir: folder of the run, which all processes must see; None: there is none.

    Raises:
        UserError: naming what differs.
    """
    if distributed.process_count() == 1:
        return
    values = {f"config.{name}": show(value) for name, value in flatten(plain(config)).items()}
    for place in ("config.data.root", "config.data.packed"):  # disks of their own
        values.pop(place, None)
    values["the list of training images"] = fingerprint
    values |= {f"the version of {name}": version for name, version in versions().items()}
    values["whether there is a --workdir"] = workdir is not None
    distributed.check_same("config", values)
    if workdir is None:
        return
    # A folder of the same name on another disk would go unnoticed until the first checkpoint.
    sign = workdir / ".processes"

    def write() -> str:
        word = f"{time.time_ns()}"
        files.write_text(sign, word)
        return word

    word = distributed.on_primary("workdir", write)
    try:
        found = files.read_text(sign) == word
    except OSError:
        found = False
    distributed.check_same("sees", {"whether it sees the files of process 0 in --workdir": found})
    if distributed.is_primary():
        sign.unlink(missing_ok=True)
