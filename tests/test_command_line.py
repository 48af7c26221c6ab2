"""Config files: where they are looked up, what they may import, and that each is run once."""

import re
import sys
from pathlib import Path

import pytest

from memseg_jax import command_line
from memseg_jax.errors import UserError

MINE = """
from configs import common

print("runs")

def get_config():
    config = common.get_config()
    config.seed = 7
    config.data.class_names = ("wall", "door")
    return config
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without the repository on sys.path; gives `configs` back afterwards."""
    root = str(command_line.SHIPPED.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", root)])
    before = {name: module for name, module in sys.modules.items() if name.startswith("configs")}
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("configs")]:
        del sys.modules[name]
    sys.modules.update(before)


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def parse(*arguments, **options):
    return command_line.parse(["program", *arguments], {"name": "a name"}, **options)


def test_a_config_file_is_run_once(elsewhere, capsys):
    line = parse("--config.train.batch_size=3", "--config", write(elsewhere / "my.py", MINE))
    assert capsys.readouterr().out == "runs\n"
    assert (line.config.seed, line.config.train.batch_size) == (7, 3)
    assert line.overrides == {"train.batch_size": 3}
    assert (line.name, line.given) == (None, set())


def test_every_form_of_an_override(elsewhere):
    file = write(elsewhere / "my.py", MINE)
    line = parse(
        "--config.train.epochs", "5", "--noconfig.augment.photometric", "--config.eval.flip",
        "--config.eval.scales=(0.5,1.0)", "--config.eval.canvases=((64,64),(64,128))",
        "--config.data.class_names=('a','b')", "--config.data.root=x=y", "--name=n", "--config",
        file, "--config.optimizer.lr=1", "--config.model.memory.base_lr=1",
    )  # fmt: skip
    config = line.config
    assert (config.train.epochs, config.augment.photometric, config.eval.flip) == (5, False, True)
    assert config.eval.scales == (0.5, 1.0)
    assert config.eval.canvases == ((64, 64), (64, 128))
    assert (config.data.class_names, config.data.root) == (("a", "b"), "x=y")
    assert (line.name, line.given, config.optimizer.lr) == ("n", {"name"}, 1.0)
    assert config.is_locked


@pytest.mark.parametrize("name", ["configs/quickstart.py", "quickstart.py"])
def test_shipped_configs_are_found_anywhere(elsewhere, name):
    assert command_line.load_config(name).data.name == "shapes"


def test_shipped_configs_of_a_folder(elsewhere):
    config = command_line.load_config("configs/plus/ade20k_fcn_resnet50.py")
    assert (config.data.name, config.model.context) == ("ade20k", "none")
    with pytest.raises(UserError, match=r"Did you mean configs/plus/ade20k_fcn_resnet50\.py "):
        command_line.load_config("configs/plus/ade20k_fnc_resnet50.py")
    # Files of one's own there import what is beside them, and what is shipped.
    (elsewhere / "mine" / "configs").mkdir(parents=True)
    write(elsewhere / "mine" / "configs" / "seeds.py", "SEED = 9")
    text = "from configs import seeds\nfrom configs.plus import voc_upernet_resnet50 as voc\n"
    text += "def get_config():\n    config = voc.get_config()\n    config.seed = seeds.SEED\n"
    file = write(elsewhere / "mine" / "configs" / "plus" / "voc.py", f"{text}    return config\n")
    assert command_line.load_config(file).seed == 9


def test_own_files_go_first(elsewhere):
    write(elsewhere / "configs" / "base.py", MINE)
    mine = "from configs import base, own_folder\ndef get_config(): return base.get_config()"
    write(elsewhere / "configs" / "quickstart.py", mine)
    assert command_line.load_config("configs/quickstart.py").seed == 7
    write(elsewhere / "configs" / "base.py", MINE.replace("7", "8"))
    assert command_line.load_config("configs/quickstart.py").seed == 8  # what was edited counts


def test_a_package_of_that_name_hides_nothing(elsewhere):
    """Neither the user's own, whose `__init__.py` runs, nor one that another library installs."""
    write(elsewhere / "configs" / "__init__.py", "SEED = 9")
    mine = MINE.replace("import common", "import SEED, common").replace("7", "SEED")
    file = write(elsewhere / "configs" / "mine.py", mine)
    assert command_line.load_config(file).seed == 9
    write(elsewhere / "library" / "x", "")
    write(elsewhere / "library" / "configs" / "__init__.py", "raise ImportError")
    sys.path.insert(0, str(elsewhere / "library"))
    assert command_line.load_config("ade20k_resnet50.py").replica_groups == 8


def test_names_that_are_not_there(elsewhere):
    with pytest.raises(
        UserError,
        match=r"file configs/quikstart.py\. Did you mean configs/quickstart.py\?",
    ):
        command_line.load_config("configs/quikstart.py")
    with pytest.raises(UserError, match=r"no config file /no/quickstart.py"):
        command_line.load_config("/no/quickstart.py")
    with pytest.raises(UserError, match=r"--config FILE is required.* configs/quickstart.py"):
        parse()
    write(elsewhere / "configs" / "mine.py", MINE)
    with pytest.raises(UserError, match=r"Config files: configs/mine.py$"):
        parse("--config.seed=1")


def test_without_config():
    line = parse("--name", "n", with_config=False)
    assert (line.name, line.given) == ("n", {"name"})
    with pytest.raises(UserError, match="--name is required"):
        parse(with_config=False, required=["name"])
    with pytest.raises(UserError, match=r"no flag --config. There are: --name"):
        parse("--config=x", with_config=False)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", "no file", "--help", doc="What it does.")
    assert end.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["What it does.", "flags:"]
    assert [line.split()[0] for line in printed[2:]] == ["--config", "--name", "--helpfull"]
    with pytest.raises(SystemExit):
        parse("--helpfull", with_config=False)
    assert "--verbosity" in capsys.readouterr().out.replace("[no]", "").replace("-v,", "")


def test_shipped_configs_lie_beside_the_package():
    assert (command_line.SHIPPED / "common.py").is_file()
    assert Path(command_line.__file__).parents[1] == command_line.SHIPPED.parent


@pytest.mark.parametrize("text", ["", "97", "97x", "0x12", "97*129", "-1x5", "1x2x3", "100000x1"])
def test_sizes(text):
    assert command_line.parse_size("--size", "97x129") == (97, 129)
    message = f"--size: found '{text}'; expected HEIGHTxWIDTH"
    with pytest.raises(UserError, match=re.escape(message)):
        command_line.parse_size("--size", text)
