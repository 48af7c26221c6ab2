"""What the documents tell the reader to type exists: flags, fields, files; the scripts parse."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs import common
from memseg_jax import main
from memseg_jax.errors import Stopped
from memseg_jax.hlo import topologies

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in (
        "launch",
        "scaling",
        "large_batches",
        "data_sets",
        "report",
        "export",
        "serve",
        "memory_map",
        "memory",
    )
]
TEXTS = [*PAGES, *sorted(LAUNCH.iterdir())]


def commands(path):
    """The arguments of every call of the program, with lines joined that go on."""
    text = re.sub(r"\\\s*\n\s*", " ", path.read_text(encoding="utf-8"))
    if path.suffix == ".yaml":
        return [" ".join(re.findall(r"^\s+- (--\S+)$", text, re.MULTILINE))]
    return re.findall(r"memseg_jax\.main\b([^\n|>]*)", text)


def names(value):
    return re.findall(r"--([\w.]+)", value)


def test_there_is_something_to_check():
    assert len(SCRIPTS) >= 3
    for path in (*PAGES, *SCRIPTS, LAUNCH / "gke.yaml"):
        if path.name == "on_host.sh":  # it starts what it is told to
            continue
        assert any(names(command) for command in commands(path)), path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_and_executable(path):
    assert path.stat().st_mode & 0o111
    bash = shutil.which("bash") or pytest.skip("no bash here")
    result = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    if shellcheck := shutil.which("shellcheck"):
        result = subprocess.run(
            [shellcheck, str(path)], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_flags_and_fields_exist(path):
    for command in commands(path):
        for name in names(command):
            if name.startswith("config."):
                value = common.get_config()
                for part in name.split(".")[1:]:
                    assert part in value, (path.name, name)
                    value = value[part]
            else:
                assert name in ("config", *main.FLAGS), (path.name, name)
        for mode in re.findall(r"--mode[ =](\w+)", command):
            assert mode in main.MODES
        for topology in re.findall(r"--topology[ =](\S+)", command):
            assert topologies.parse(topology).name == topology


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_and_fields_in_the_text_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\b((?:configs|docs|benchmarks|tests)/[\w./]+\.\w+)\b", text):
        assert (ROOT / name).is_file(), (path.name, name)
    for target in re.findall(r"\]\(([^)#:]+)\)", text) if path.suffix == ".md" else ():
        assert (path.parent / target).exists(), (path.name, target)
    for field in re.findall(r"`config\.([\w.]+)`", text):
        value = common.get_config()
        for part in field.split("."):
            assert part in value, (path.name, field)
            value = value[part]


def test_the_status_that_says_go_on():
    status = str(Stopped.EXIT_STATUS)
    assert f"status {status}" in (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    assert f'"$status" -eq {status}' in (LAUNCH / "slurm.sh").read_text(encoding="utf-8")
    assert f"idle | lost | {status})" in (LAUNCH / "tpu_pod.sh").read_text(encoding="utf-8")
    assert f"values: [{status}]" in (LAUNCH / "gke.yaml").read_text(encoding="utf-8")


def test_the_job_of_kubernetes():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text(encoding="utf-8"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == x * y // chips
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
