"""The report of a folder of results, and the section for benchmarks/RESULTS.md; no figure by hand.

    python -m benchmarks.accelerator.report --folder runs/accelerator

`python -m benchmarks.accelerator` writes both after every step.
"""

import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import goals, run
from benchmarks.accelerator.goals import Results, figures
from benchmarks.seeds import paired
from memseg_jax import command_line
from memseg_jax.errors import UserError
from memseg_jax.hlo.chips import arithmetic
from memseg_jax.runtime.text import format_bytes, format_duration

REPORT, SECTION = "report.md", "section.md"
FLAGS = {"folder": "that was the --output of benchmarks.accelerator (required)"}
_COMPARISONS = ("training", "evaluation", "memory-update", "loss", "attention")


def main(argv: Sequence[str]) -> int:
    """Writes both files; returns the exit status."""
    values = command_line.parse(list(argv), FLAGS, ["folder"], __doc__, with_config=False)
    folder = Path(values.folder)
    write(folder)
    print(f"wrote {folder / REPORT} and {folder / SECTION}")
    return 0


def write(folder: Path) -> None:
    """Writes `report.md` and `section.md` from what is in a folder.

    Raises:
        UserError: it holds no results, or not those of the machine.
    """
    results = run.read_all(folder)
    machine = run.machine_of(results)
    if not machine:
        raise UserError(
            f"{folder} does not say what machine its figures are of: its step `machine` has not "
            "ended; run `python -m benchmarks.accelerator` with this folder as --output again"
        )
    body = section(results, machine)
    (folder / SECTION).write_text("\n".join(body) + "\n", encoding="utf-8")
    text = [*body, "", "### Steps", "", *steps_table(results)]
    (folder / REPORT).write_text("\n".join(text) + "\n", encoding="utf-8")


def section(results: Results, machine: Mapping[str, Any]) -> list[str]:
    """The lines for benchmarks/RESULTS.md: every figure that there is.

    Args:
        results: from `run.read_all`.
        machine: from `run.machine_of`.
    """
    versions = ", ".join(f"{name} {x}" for name, x in machine["versions"].items())
    on_cpu = machine["platform"] == "cpu"
    title = "On a CPU, for want of an accelerator" if on_cpu else "On an accelerator"
    lines = [
        f"## {title}: {machine['device']}",
        "",
        "    python -m benchmarks.accelerator",
        "",
        f"{machine['devices']} device(s), {machine['cores']} cores, {machine['system']}, Python "
        f"{machine['python']}; {versions}"
        + (f"; {machine['nvidia_smi']}" if machine["nvidia_smi"] else "")
        + (f"; commit {machine['commit'][:10]}" if machine["commit"] else "")
        + ". Every line is from the results of that command.",
    ]
    if not machine["torch_sees_the_device"]:
        lines += ["", "PyTorch here cannot use the device: JAX alone."]
    parts = {
        "Goals for one H200": goals_table(results),
        "Parity": parity_tables(results),
        "Training and evaluation": benchmark_table(results),
        "Beside PyTorch": comparison_table(results),
        "Convolutions": convolution_lines(results, with_threshold=not on_cpu),
        "Where the time goes": kernel_tables(results),
        "Input": input_lines(results),
        "Trainings": training_lines(results),
    }
    for title, part in parts.items():
        if part:
            lines += ["", f"### {title}", "", *part]
    return lines


# ---- The parts; each is empty where nothing was measured ----------------------------------------


def goals_table(results: Results) -> list[str]:
    """Met, missed or not measured."""
    rows = [(x.goal, x.status, x.found) for x in goals.check(results)]
    return _table(("goal", "verdict", "found"), rows)


def parity_tables(results: Results) -> list[str]:
    """Largest differences from stored numbers and from the CPU, by arithmetic."""
    rows: list[tuple] = []
    columns: dict[str, None] = {}
    for values in _all(results, "goldens-", "rows"):
        for row in values["rows"]:
            rows.append((f"stored numbers, {row['case']}", row["differences"], row["holds"]))
    for values in _all(results, "parity-", "differences"):
        rows.append((f"the CPU, {values['what']}", values["differences"], values["holds"]))
    for _, found, _ in rows:
        columns |= dict.fromkeys(found)
    lines: list[tuple] = []
    for what, found, holds in rows:
        for quantity in next(iter(found.values())):
            cells = [f"{found[x][quantity]:.1e}" if x in found else "-" for x in columns]
            within = "" if quantity not in ("logits", "taps") else "yes" if holds else "NO"
            lines.append((what, quantity, *cells, within))
    if not lines:
        return []
    note = "Logits and intermediates (taps): the largest difference as a share of the standard "
    note += "deviation; the rest: root mean squares. The limits are those of "
    note += "`converters.check_parity`, and hold for float32 in the forward pass."
    return [note, "", *_table(("compared with", "of", *columns, "within"), lines)]


def benchmark_table(results: Results) -> list[str]:
    """`--mode benchmark`: one row for each model and type."""
    rows = []
    for values in _all(results, "benchmark-", "images_per_second"):
        crop, image = ("x".join(map(str, values[x])) for x in ("crop", "evaluation_image"))
        share = values.get("share_of_nominal_peak")
        peak = values.get("device_peak_bytes")
        rows.append(
            (
                f"{values['backbone']}, {values['batch_size']} x {crop}, {arithmetic(values)}",
                f"{values['images_per_second']:.4g}",
                f"{values['flops_per_second'] / 1e12:.3g}",
                "-" if share is None else f"{share:.0%}",
                format_bytes(values["peak_bytes"]),
                "-" if peak is None else format_bytes(peak),
                f"{values['compile_seconds']:.0f}{' *' if values['compiled_before'] else ''}",
                f"{image} {values['evaluation_mode']}",
                f"{1 / values['evaluation_seconds_per_image']:.4g}",
            )
        )
    if not rows:
        return []
    header = ("training", "images/s", "TFLOP/s", "of peak", "step's memory", "device's peak")
    header += ("compile s", "evaluation", "images/s")
    return [*_table(header, rows), "", "`*`: from the cache. The peak is the maker's figure."]


def comparison_table(results: Results) -> list[str]:
    """What was measured in turn with PyTorch."""
    rows = []
    for values in _all(results, _COMPARISONS, "results"):
        ours, *others = values["results"]
        for row in others:
            rows.append(
                (
                    values["what"],
                    row["name"],
                    f"{row['ratio']:.3g}",
                    f"{1e3 * ours['seconds']:.4g} / {1e3 * row['seconds']:.4g}",
                    f"{format_bytes(ours['memory'])} / {format_bytes(row['memory'])}",
                )
            )
        if not others:
            alone = f"{1e3 * ours['seconds']:.4g}"
            rows.append((values["what"], "(alone)", "-", alone, format_bytes(ours["memory"])))
    header = ("what", "beside", "its time, times JAX's", "ms, JAX / it", "memory, JAX / it")
    return _table(header, rows) if rows else []


def convolution_lines(results: Results, with_threshold: bool) -> list[str]:
    """The forms of each convolution.

    Args:
        results: from `run.read_all`.
        with_threshold: whether to say from which dilation on folding is faster than shifts, which
            only GPUs choose between.
    """
    found: dict[tuple, Mapping[str, Any]] = {}
    for values in _all(results, "convolutions-", "rows"):
        for row in values["rows"]:
            batch, crop = values["batch"], "x".join(map(str, values["crop"]))
            found[row["convolution"], row["pass"], f"{batch} x {crop}"] = row
    if not found:
        return []
    rows, folds = [], []
    for (name, kind, images), row in found.items():
        times = {x["name"]: 1e3 * x["seconds"] for x in row["results"]}
        ours = {x: time for x, time in times.items() if x != "PyTorch"}
        best = min(ours, key=lambda x: ours[x])
        each = ", ".join(f"{x} {time:.3g}" for x, time in times.items())
        rows.append((f"{name}, {images}", kind, best, each))
        if {"folding", "shifts"} <= times.keys():
            in_map = min(row["map"]) / row["dilation"]
            folds.append((in_map, times["folding"] / times["shifts"], name))
    lines = _table(("convolution", "pass", "fastest of ours", "ms of each"), rows)
    if folds and with_threshold:
        lines += ["", *_threshold(sorted(folds))]
    return lines


def _threshold(folds: Sequence[tuple[float, float, str]]) -> list[str]:
    """For `DILATIONS_PER_MAP_TO_FOLD` in memseg_jax/models/convolution.py."""
    rows = [(f"{in_map:.3g}", name, f"{ratio:.3g}") for in_map, ratio, name in folds]
    lines = _table(("dilations in the map", "filter gradient", "folding, times shifts"), rows)
    better = [in_map for in_map, ratio, _ in folds if ratio < 1]
    worse = [in_map for in_map, ratio, _ in folds if ratio >= 1]
    if not better or not worse:
        verdict = f"{'Folding wins' if better else 'Shifts win'} in all of these."
    elif max(worse) < min(better):
        verdict = f"Folding wins from {min(better):.3g} dilations in the map on, shifts below."
    else:
        verdict = f"Mixed between {min(better):.3g} and {max(worse):.3g} dilations in the map."
    return [*lines, "", f"{verdict} `DILATIONS_PER_MAP_TO_FOLD` should follow that on a GPU."]


def kernel_tables(results: Results) -> list[str]:
    """The longest kernels of each traced model."""
    lines: list[str] = []
    for values in _all(results, "kernels-", "rows"):
        rows = [
            (row["name"][:70], ", ".join(row["operations"][:1])[:40], f"{row['share']:.1%}")
            for row in values["rows"]
        ]
        milliseconds = 1e3 * values["seconds"] / (values["steps"] or 1)
        title = f"{values['what']}, {milliseconds:.4g} ms in kernels each:"
        lines += ["", title, "", *_table(("kernel", "operation", "of the time"), rows)]
    return lines[1:]


def input_lines(results: Results) -> list[str]:
    """What the host prepares, and what the device takes."""
    machine = run.machine_of(results) or {}
    lines = []
    for values in figures(results, "input-pipeline", "images_per_second"):
        each = values["images_per_second"].items()
        rates = ", ".join(f"{rate:.4g} images/s with {name}" for name, rate in each)
        core = 1 / values["core_seconds_per_image"]
        lines.append(
            f"`{values['config']}`, {values['files']}: {core:.4g} images/s of one core; of "
            f"{machine.get('cores')} cores {rates}."
        )
        wanted = [
            (x["images_per_second"], f"{x['backbone']}, {arithmetic(x)}")
            for x in _all(results, "benchmark-", "images_per_second")
        ]
        if wanted:
            rate, name = max(wanted)
            lines.append(
                f"The device takes {rate:.4g} images/s at most ({name}): {rate / core:.1f} cores."
            )
    return lines


def training_lines(results: Results) -> list[str]:
    """The quickstart and the trainings of CamVid."""
    lines = []
    for values in figures(results, "quickstart", "mIoU"):
        took = format_duration(results["quickstart"]["seconds"])
        lines.append(f"Quickstart: mIoU {values['mIoU']:.4f}, {took} from its start to its end.")
    rows = []
    found = {x: goals.scores(results, x) for x in ("memory", "baseline")}
    for variant, by_seed in found.items():
        if by_seed:
            each = ", ".join(f"{seed}: {score:.4f}" for seed, score in sorted(by_seed.items()))
            rows.append((variant, f"{statistics.fmean(by_seed.values()):.4f}", each))
    if rows:
        lines += ["", "CamVid, ResNet-50, to the end, mIoU on the test split:", ""]
        lines += _table(("variant", "mean", "by seed"), rows)
    both = found["memory"].keys() & found["baseline"].keys()
    if both:
        low, mean, high = paired(found["baseline"], found["memory"])
        interval = f"95 % interval {low:+.4f} to {high:+.4f}" if len(both) > 1 else "one seed"
        lines += ["", f"Memory less baseline: {mean:+.4f} ({interval})."]
    return lines


def steps_table(results: Results) -> list[str]:
    """What became of each step, with its commands."""
    rows = [
        (
            result["name"],
            result["status"],
            format_duration(result["seconds"]) if result["seconds"] else "-",
            "; ".join(f"`python {' '.join(x)}`" for x in result["commands"]),
        )
        for result in results.values()
    ]
    return _table(("step", "status", "took", "commands"), rows)


# ---- Helpers ------------------------------------------------------------------------------------


def _all(results: Results, prefix: str | tuple[str, ...], key: str) -> Iterable[Mapping[str, Any]]:
    """The objects with a key, of all steps that ended and whose names begin so."""
    for name in results:
        if name.startswith(prefix):
            yield from figures(results, name, key)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
