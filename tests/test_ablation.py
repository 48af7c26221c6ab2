"""The benchmark that trains variants of a config with several seeds."""

import csv
import json

import pytest
from scipy import stats

from memseg_jax import command_line
from memseg_jax.errors import UserError
from tests import tiny
from tests.session import cache

pytest.importorskip("torch")  # the benchmarks' command line sets its threads


@pytest.fixture
def ablation():
    from benchmarks import ablation

    return ablation


def test_differences_are_those_of_the_seeds_that_both_have(ablation):
    a, b = {0: 0.5, 1: 0.6, 2: 0.7, 7: 0.1}, {0: 0.6, 1: 0.65, 2: 0.85, 9: 0.9}
    low, mean, high = ablation.paired(a, b)
    expected = stats.ttest_rel([b[i] for i in range(3)], [a[i] for i in range(3)])
    assert mean == pytest.approx(0.1)
    interval = expected.confidence_interval(0.95)
    assert (low, high) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_no_interval(ablation):
    rows = [{"variant": name, "seed": 3, "mIoU": score} for name, score in (("a", 0.5), ("b", 0.4))]
    assert ablation.table(rows).splitlines()[2:] == [
        "| a | 3 | 0.5000 | - | +0.0000 | - to - |",
        "| b | 3 | 0.4000 | - | -0.1000 | - to - |",
    ]


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": "model.fpn=True"}', '{"a": ["fpn"]}', "{"])
def test_another_file_is_refused(ablation, tmp_path, text):
    (tmp_path / "variants.json").write_text(text)
    with pytest.raises(UserError, match=r"--variants=.*variants\.json"):
        ablation.read_variants(str(tmp_path / "variants.json"))


def test_some_of_the_variants(ablation):
    variants = {"a": ["x=1"], "b": ["x=2"], "later rows": ["x=3"]}
    assert ablation.choose(variants, "") == variants
    chosen = ablation.choose(variants, "later rows, a")
    assert list(chosen.items()) == [("later rows", ["x=3"]), ("a", ["x=1"])]
    with pytest.raises(UserError, match=r"--only: no variant 'late rows'.*later rows"):
        ablation.choose(variants, "a,late rows")


def test_seeds_are_numbers(ablation):
    assert ablation.read_seeds("0, 4") == [0, 4]
    with pytest.raises(UserError, match="--seeds=0,x: expected numbers"):
        ablation.read_seeds("0,x")


def test_what_a_run_took_is_kept(ablation, tmp_path, monkeypatch):
    calls = []

    def train(config_flag, flags, folder):
        calls.append(folder.name)
        return {"mIoU": 0.5, "mAcc": 0.5, "aAcc": 0.5, "seconds": float(len(calls))}

    def run(seeds):
        flags = [f"--variants={tmp_path / 'variants.json'}", f"--workdir={tmp_path}"]
        assert ablation.main(["ablation", *flags, f"--seeds={seeds}"]) == 0
        found = ablation.read(tmp_path / ablation.RESULTS)
        return {key: row["seconds"] for key, row in found.items()}

    (tmp_path / "variants.json").write_text('{"a": [], "b": []}')
    monkeypatch.setattr(ablation, "train", train)
    assert run("0") == {("a", 0): 1, ("b", 0): 2}
    # Nothing of earlier calls is lost, even of seeds that this one does not ask for.
    assert run("1") == {("a", 0): 1, ("b", 0): 2, ("a", 1): 3, ("b", 1): 4}
    assert run("0,1") == {("a", 0): 1, ("b", 0): 2, ("a", 1): 3, ("b", 1): 4}
    assert calls == 2 * ["a_0", "b_0", "a_1", "b_1"]


def test_a_picture_of_results(ablation, tmp_path, capsys):
    from PIL import Image

    from benchmarks import ablation_plots

    with pytest.raises(UserError, match=r"ablation\.csv is not there"):
        ablation_plots.main(["plots", f"--workdir={tmp_path}"])
    facts = {"mAcc": 0.5, "aAcc": 0.5, "seconds": 1.0}
    rows = [
        {"variant": name, "seed": seed, "mIoU": score + 0.01 * seed, **facts}
        for name, score in (("plain", 0.5), ("with rows", 0.4))
        for seed in range(3)
    ]
    ablation.write(tmp_path / ablation.RESULTS, rows)
    assert ablation_plots.main(["plots", f"--workdir={tmp_path}", "--title=x"]) == 0
    alone = Image.open(tmp_path / "ablation.png").size
    for seed in range(2):  # the third run is not there any more
        run = ablation.folder_of(tmp_path, "with rows", seed)
        run.mkdir()
        lines = [f"{step},{2 / step + seed}," for step in (1, 2, 3)]
        text = "step,loss_stage2,eval_mIoU\n" + "\n".join(lines) + "\n3,,0.4\n"
        (run / "metrics.csv").write_text(text)
    curves = ablation_plots.read_curves(tmp_path, "with rows", {0: 0.4, 1: 0.4, 2: 0.4})
    assert curves == {1: [2, 3], 2: [1, 2], 3: [2 / 3, 2 / 3 + 1]}
    output = tmp_path / "b.png"
    arguments = [f"--workdir={tmp_path}", "--only=with rows,plain", f"--output={output}"]
    assert ablation_plots.main(["plots", *arguments]) == 0
    assert str(output) in capsys.readouterr().out
    with_curves = Image.open(output)
    assert with_curves.size[0] > alone[0]
    assert len(with_curves.convert("RGB").getcolors(2**24)) > 10


@pytest.mark.parametrize("name", ["methods", "memory_variants"])
def test_the_variants_are_what_the_rules_allow(name):
    """The files that come with it, with the quickstart."""
    variants = json.loads((tiny.ROOT / "benchmarks" / f"{name}.json").read_text())
    for settings in variants.values():
        flags = ["--config=configs/quickstart.py", *(f"--config.{x}" for x in settings)]
        assert command_line.parse(["x", *flags], {}).config.data.name == "shapes"  # no UserError


@pytest.mark.slow
@pytest.mark.exhaustive  # four starts of the real program, whose resuming has tests of its own
def test_what_is_there_is_not_trained_again(ablation, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setenv("MEMSEG_CACHE", cache())
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    variants = {"plain": ["model.memory.enabled=False", "loss.consistency=0.0"], "memory": []}
    (tmp_path / "variants.json").write_text(json.dumps(variants))

    def run():
        flags = [f"--variants={tmp_path / 'variants.json'}", f"--workdir={tmp_path / 'runs'}"]
        flags += ["--seeds=1", f"--config={tiny.CONFIG}", "--config.train.epochs=1"]
        data = f"--config.data.root={tiny.data_root()}"
        assert ablation.main(["ablation", *flags, data]) == 0
        with open(tmp_path / "runs" / ablation.RESULTS) as file:
            rows = list(csv.DictReader(file))
        return rows, capsys.readouterr().out

    rows, printed = run()
    assert [(row["variant"], row["seed"]) for row in rows] == [("plain", "1"), ("memory", "1")]
    assert "| memory | 1 | " in printed
    checkpoint = next((tmp_path / "runs" / "memory_1" / "checkpoints").iterdir())
    written = checkpoint.stat().st_mtime
    again, _ = run()
    assert checkpoint.stat().st_mtime == written
    assert again == rows  # the seconds, too
