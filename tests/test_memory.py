"""The memory mode: its files and its page, for both methods, also in a bucket."""

import io
import re

import numpy as np
import pytest

from memseg_jax.checkpoint import restore_for_inference
from memseg_jax.data import open_split
from memseg_jax.inspection import inspector, maps
from memseg_jax.inspection.worth import other_memories
from memseg_jax.models.segmentor import build_segmentor
from memseg_jax.modes import memory as mode
from memseg_jax.runtime import files
from memseg_jax.scoring import memory_history
from memseg_jax.scoring.evaluator import Evaluator
from memseg_jax.training.state import abstract_variables
from tests import tiny

pytestmark = pytest.mark.usefixtures("quiet_entry", "compilations", "three_convolutions")
HOSTILE = ("ground", "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>')


def config_of(method):
    config = tiny.get_config()
    config.model.method = method
    config.loss.consistency = 0.0  # which MCIBI++ has not
    config.data.class_names = HOSTILE
    config.data.root = str(tiny.data_root())
    return config


def flags_of(method):
    return [f"--config.data.root={tiny.data_root()}", f"--config.model.method={method}",
            "--config.loss.consistency=0.0",
            f"--config.data.class_names={HOSTILE!r}"]  # fmt: skip


def keep_history(workdir, memory):
    """Records of three evaluations; the one after the checkpoint is not to be shown."""
    for step, share in ((3, 0.5), (7, 1), (9, 2)):
        counts = np.array([1000, 200, 30]) * step
        record = {"memory": memory * share, "ages": counts * 0 + step, "pixels": counts}
        memory_history.write(workdir, step, record | {"steps": counts // 10, "since": 0})


def arrays_of(path):
    return dict(np.load(io.BytesIO(files.read_bytes(path))))


METHODS = ["mcibi", pytest.param("mcibi_plus_plus", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_found(place_of_run, method, tmp_path, capsys, monkeypatch):
    for module in (maps, inspector):  # it takes most of the time, and is tested by itself
        monkeypatch.setattr(module, "has_neighbour_maps", lambda: False)
    config, workdir = config_of(method), place_of_run
    tiny.save_random_model(workdir, config)
    model = build_segmentor(config)
    variables, _ = restore_for_inference(workdir, abstract_variables(model), 7)
    memory = np.asarray(variables["memory"])
    keep_history(workdir, memory)
    photo = tiny.write(tmp_path / "<i>photo.png", tiny.picture(5, 40, 36)[0])
    status = tiny.run(
        "--mode=memory", "--workdir", workdir, "--input", photo, "--pixel=39,35", *flags_of(method)
    )
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert files.names(workdir / "memory") == [
        "map.png", "memory.html", "memory.npz", "sections.json", "similarity.png",
    ]  # fmt: skip
    found = arrays_of(workdir / "memory" / "memory.npz")
    np.testing.assert_array_equal(found["memory"], memory)
    np.testing.assert_allclose(found["norms"], np.linalg.norm(found["rows"], axis=-1), rtol=1e-6)
    assert found["history_steps"].tolist() == [3, 7]
    assert found["pixels"].tolist() == [7000, 1400, 210]
    assert found["pixel"].tolist() == [39, 35]
    assert found["pixel_memory_attention"].sum() == pytest.approx(1, abs=1e-5)

    # The same numbers from states that are changed by hand.
    evaluator = Evaluator(config, model, open_split(config.data, "val"))
    order = other_memories(np.arange(3))["rows permuted"]
    hands = {"as_trained": memory, "rows_permuted": memory[order], "zeros": memory * 0}
    for name, by_hand in hands.items():
        matrix = evaluator.evaluate(variables | {"memory": by_hand}).matrix
        np.testing.assert_array_equal(found[f"confusion_{name}"], matrix)
    means = re.findall(r"^  (?:as trained|rows permuted|zeros) +(\d\.\d+)", shown.out, re.M)
    assert len(means) == 3
    assert (
        'no map by t-SNE, as scikit-learn is not installed: pip install "memseg_jax[' in shown.out
    )

    text = files.read_text(workdir / "memory" / "memory.html")
    for name in (*HOSTILE[1:], "<i>photo.png"):
        assert name not in text
    assert text.count("alert(1)") > 0  # shown as text
    assert "http:" not in text
    assert "https:" not in text
    assert set(re.findall(r"""(?:src|href)=["'](\w+:?)""", text)) == {"data:"}
    for part in ("7,000", "<polyline", "How the rows became", "First attention"):
        assert part in text


# ---- What is refused ----------------------------------------------------------------------------


def test_a_model_without_memory(tmp_path, capsys):
    config = tiny.get_config()
    config.model.memory.enabled = False
    tiny.save_random_model(tmp_path, config)
    status = tiny.run("--mode=memory", "--workdir", tmp_path, "--config.model.memory.enabled=False")
    assert status == 1
    assert "no memory to look into" in capsys.readouterr().err
    assert not (tmp_path / "memory").exists()


def test_what_cannot_be_done(tmp_path, capsys):
    workdir = tiny.save_random_model(tmp_path / "run")
    photo = tiny.write(tmp_path / "photo.png", tiny.picture(5, 40, 36)[0])

    def error(*flags):
        root = f"--config.data.root={tiny.data_root()}"
        assert tiny.run("--mode=memory", "--workdir", workdir, root, *flags) == 1
        return capsys.readouterr().err

    assert "it has 40 rows and 36 columns" in error(f"--input={photo}", "--pixel=40,0")
    assert "--pixel a,b: expected ROW,COLUMN" in error(f"--input={photo}", "--pixel=a,b")
    assert "none.png" in error(f"--input={tmp_path / 'none.png'}")
    assert "--mode memory needs --input, too" in error("--pixel=1,2")
    assert "there is no checkpoint" in error("--checkpoint=8")


def test_pixels_are_rows_and_columns():
    assert mode.parse_pixel(" 12, 7 ") == (12, 7)
