"""Measures the tests: which share of small mistakes, made on purpose, do they find?

    pip install cosmic-ray
    python -m tests.mutation --ref HEAD --results mutants.jsonl
    python -m tests.mutation --ref HEAD --tests_from v1 --results mutants_v1.jsonl

A mutant is a file of the package with one change: another operator, number or comparison, a branch
turned around, a loop that never runs. The unit tests of that file (`TESTS`) run on it, in a
worktree of the git commit, and should fail. Files get equal shares of the mutants, of each place in
a file one at most; which ones depends on the seed and the file alone, so that two sets of tests
meet the same ones.
A run that was stopped goes on where it was; survivors are printed as they are found.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CHECKPOINT = ("checkpoint/test_checkpoint.py", "checkpoint/test_faults.py", "test_verify.py")
TESTS = {
    "models/memory.py": ("models/test_memory.py", "models/test_memory_goldens.py"),
    "training/losses.py": ("training/test_losses.py", "runtime/test_rows.py"),
    "training/step.py": ("training/test_step.py", "training/test_accumulation.py"),
    "data/transforms.py": (
        "data/test_transforms.py",
        "data/test_augmentation_distributions.py",
    ),
    "scoring/metrics.py": ("scoring/test_metrics.py",),
    "checkpoint/checksums.py": ("checkpoint/test_checksums.py",),
    "checkpoint/meta.py": ("checkpoint/test_meta.py", "checkpoint/test_checkpoint.py"),
    "checkpoint/lock.py": ("checkpoint/test_lock.py",),
    "checkpoint/arrays.py": ("checkpoint/test_arrays.py", *CHECKPOINT),
    "checkpoint/manager.py": CHECKPOINT,
    "checkpoint/scores.py": CHECKPOINT,
    "checkpoint/steps.py": CHECKPOINT,
}


# A product in place of a sum may go unnoticed; a shift in place of one fails in any test.
ALIKE = ({"Add", "Sub", "Mul", "Div", "FloorDiv"}, {"BitAnd", "BitOr", "BitXor"})
LEFT_OUT = ("NoOp", "ExceptionReplacer")  # the second one breaks on names with a dot


# ---- Mutants ------------------------------------------------------------------------------------


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


def _meaning(source: str) -> str:
    return ast.dump(_WithoutAnnotations().visit(ast.parse(source)))


def _senseless(operator: str) -> bool:
    what, *change = operator.split("_")
    if what != "ReplaceBinaryOperator":
        return False
    return not any(set(change) <= group for group in ALIKE)


def mutants(source: str, seed: int) -> Iterator[tuple[str, int, str]]:
    """Yields all mutants of a file, in an order that the seed draws.

    Args:
        source: its text.
        seed: of the order, and of the choice between the mutants of one place.

    Yields:
        What was changed as "operator line:column", the line, and the mutated text.
    """
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    def rank(*what):
        return hashlib.sha1(repr((seed, *what)).encode()).digest()

    found = []
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        short = name.rpartition("/")[2]
        if kind.arguments() or short in LEFT_OUT or _senseless(short):
            continue
        positions = (
            p for node in ast_nodes(get_ast(source)) for p in kind().mutation_positions(node)
        )
        for occurrence, ((line, column), _) in enumerate(positions):
            found.append((rank(line, column, name), (line, column), name, occurrence))
    known, places = {_meaning(source)}, set()
    for _, place, name, occurrence in sorted(found):
        if place in places:
            continue
        text = mutate_code(source, plugins.get_operator(name)(), occurrence)
        try:
            meaning = _meaning(text)
        except SyntaxError:
            continue
        if meaning not in known:  # or only a type annotation is another one
            known.add(meaning)
            places.add(place)
            operator = name.rpartition("/")[2]
            yield f"{operator} {place[0]}:{place[1]}", place[0], text


# ---- Tests --------------------------------------------------------------------------------------


@contextlib.contextmanager
def worktree(ref: str, tests_from: str | None) -> Iterator[Path]:
    """A folder with a commit of this repository, and the tests of another one if it is given."""
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(tree)]
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), ref], check=True)
        try:
            if tests_from:
                subprocess.run([*git, "rm", "-rq", "tests"], check=True)
                subprocess.run([*git, "checkout", "-q", tests_from, "--", "tests"], check=True)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def run_tests(tree: Path, files: tuple[str, ...], cache: str, limit: float) -> tuple[str, str]:
    """Runs the fast tests of some files until the first that fails.

    Args:
        tree: the checkout.
        files: below `tests`; those that the checkout lacks are left out.
        cache: folder of compiled programs; most programs are the same for most mutants.
        limit: seconds until the tests count as hanging.

    Returns:
        "passed", "failed" or "timeout", and the name of the failing test or the end of the output.
    """
    paths = [f"tests/{file}" for file in files if (tree / "tests" / file).exists()]
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *paths]
    env = os.environ | {
        "MEMSEG_CACHE": cache,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONDONTWRITEBYTECODE": "1",  # two mutants of one second and size would be the same
    }
    process = subprocess.Popen(
        command, cwd=tree, env=env, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return "timeout", ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what the tests started
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    outcome = "passed" if process.returncode == 0 else "failed"
    return outcome, found[1] if found else output[-500:]


def measure(tree: Path, file: str, count: int, seed: int, cache: str, done: set[str]) -> Iterator:
    """Tries mutants of one file; yields a dictionary for each that is not in `done`."""
    path = tree / "memseg_jax" / file
    source = path.read_text(encoding="utf-8")
    chosen = [m for m, _ in zip(mutants(source, seed), range(count), strict=False)]
    if all(f"{file} {what}" in done for what, _, _ in chosen):
        return
    start = time.monotonic()
    outcome, shown = run_tests(tree, TESTS[file], cache, 1800)
    if outcome != "passed":
        sys.exit(f"{file}: its tests do not pass without a mutant: {outcome}\n{shown}")
    limit = 60 + 3 * (time.monotonic() - start)
    for what, line, text in chosen:
        if f"{file} {what}" in done:
            continue
        start = time.monotonic()
        try:
            path.write_text(text, encoding="utf-8")
            outcome, shown = run_tests(tree, TESTS[file], cache, limit)
        finally:
            path.write_text(source, encoding="utf-8")
        changed = difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm="")
        yield {
            "mutant": f"{file} {what}",
            "line": line,
            "survived": outcome == "passed",
            "outcome": outcome,
            "seconds": round(time.monotonic() - start, 1),
            "test": shown if outcome == "failed" else "",
            "diff": list(changed)[3:],
        }


def main() -> int:
    """Runs the mutants that the results lack, and prints the share that was found, by file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", default="HEAD", help="the commit whose package is changed")
    parser.add_argument("--tests_from", help="another commit, whose tests run")
    parser.add_argument("--count", type=int, default=300, help="mutants of all files together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    flags = parser.parse_args()
    share = -(-flags.count // len(TESTS))
    results = []
    if flags.results.exists():
        results = [json.loads(line) for line in flags.results.read_text().splitlines()]
    done = {result["mutant"] for result in results}
    with worktree(flags.ref, flags.tests_from) as tree, open(flags.results, "a") as file:
        for name in TESTS:
            if flags.only not in name:
                continue
            for result in measure(tree, name, share, flags.seed, f"{tree}/cache", done):
                results.append(result)
                print(json.dumps(result), file=file, flush=True)
                if result["survived"]:
                    print(result["mutant"], *result["diff"], sep="\n  ", flush=True)
    made = Counter(result["mutant"].split()[0] for result in results)
    found = Counter(r["mutant"].split()[0] for r in results if not r["survived"])
    for name, total in made.items():
        print(f"{name:28} {found[name]:3} of {total:3} found")
    print(f"{'all':28} {found.total():3} of {made.total():3} found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
