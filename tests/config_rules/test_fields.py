"""Every field has a rule; values outside are refused by name, values inside are accepted."""

import functools
import importlib
import inspect
import math
import operator
import pkgutil
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memseg_jax.data
import memseg_jax.models
from configs import common
from memseg_jax import config_rules
from memseg_jax.command_line import field_values, load_config
from memseg_jax.config_rules.fields import RULES
from memseg_jax.config_rules.kinds import (
    Choice,
    Either,
    Number,
    Several,
    Switch,
    Table,
    Text,
    Whole,
    show,
)
from memseg_jax.errors import UserError
from memseg_jax.models.mcibi import MCIBI
from memseg_jax.models.mcibi_plus_plus import MCIBIPlusPlus
from memseg_jax.models.plain import Plain
from memseg_jax.models.segmentor import Segmentor
from tests.small_models import small_config
from tests.tiny_config import get_config

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [p for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "common", "own_folder")]
ARGUMENTS = ("", ":ms_flip", ":2021", ":2025", ":2025,ms_flip")
# Whether their values are right depends on other fields, too; see test_relations.py.
RELATED = {
    "replica_groups", "sharding.data", "sharding.rows", "sharding.fsdp", "init.backbone",
    "init.checkpoint",
    "data.name", "data.class_names", "data.palette", "data.label_map", "data.label_colors",
    "data.ignore_colors", "data.unknown_color", "data.label_name", "data.outside_polygons",
    "augment.scale_range", "augment.flip_pairs", "loss.class_weights", "loss.stage2",
    "model.memory.momentum", "model.memory.base_lr", "optimizer.lr", "optimizer.min_lr",
    "train.batch_size", "train.accumulate", "train.early_stop", "model.norm_group",
    "model.method", "model.context", "model.backbone", "model.fpn", "model.drop_path",
    "model.decoder_kernels.pixels", "model.decoder_kernels.context", "model.decoder_kernels.final",
    "model.memory.downsample", "model.memory.read_by", "model.memory.fuse_before_fpn",
    "loss.context",
}  # fmt: skip


def config_with(field, value):
    """The tiny config with another value, whose type is not made that of the old one."""
    values = get_config().to_dict()
    *groups, name = field.split(".")
    functools.reduce(operator.getitem, groups, values)[name] = value
    return ml_collections.ConfigDict(values)


def refusal_of(field, value):
    """The message about a value; fails if there is none, or if it is another kind of error."""
    with pytest.raises(UserError) as caught:
        config_rules.check(config_with(field, value))
    return str(caught.value)


# ---- All fields ---------------------------------------------------------------------------------


def test_every_field_has_a_rule_and_every_rule_a_field():
    tables = {field for field, rule in RULES.items() if isinstance(rule, Table)}
    values = field_values(common.get_config())
    fields = {f for f, value in values.items() if f in tables or not hasattr(value, "items")}
    assert fields == set(RULES)


def test_the_defaults_lack_nothing_but_the_classes():
    config = common.get_config()
    with pytest.raises(UserError, match=r"^config.data.class_names is \('',\); expected 2 to 254"):
        config_rules.check(config)
    config.data.class_names = ("a", "b")
    config_rules.check(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_passes(path):
    passed = 0
    for argument in ARGUMENTS:
        try:
            config = load_config(f"{path}{argument}")
        except UserError:  # it does not know the argument
            continue
        config_rules.check(config)
        passed += 1
    assert passed >= 1


def test_the_configs_of_tests_and_of_own_folders_pass():
    from configs import own_folder

    config_rules.check(get_config())
    config_rules.check(small_config())
    config_rules.check(own_folder.get_config("root", ["a", "b"]))


# ---- Values outside -----------------------------------------------------------------------------

WORDS = st.text("abc_ 09.", max_size=8)
NO_NUMBERS = st.one_of(
    st.none(), st.booleans(), WORDS, st.sampled_from(["0.5", "1"]), st.just(()), st.just([0.5]),
    st.just(np.float32(0.5)), st.just(np.int64(1)), st.just(np.bool_(True)), st.just(1j),
    st.just(np.ones(2)), st.just(float("nan")), st.just(float("inf")), st.just(-float("inf")),
)  # fmt: skip
HUGE = st.sampled_from([10**30, -(10**30), 10**400])


@functools.cache
def outside(rule):
    """Draws (value, what of it the message must show)."""
    if isinstance(rule, Several):
        return st.one_of(wrong_containers(rule), wrong_lengths(rule), wrong_items(rule))
    if isinstance(rule, Either):
        values = st.one_of(*map(outside, rule.rules)).map(lambda pair: pair[0])
        return values.filter(lambda value: not rule.allows(value)).map(lambda value: (value, value))
    if isinstance(rule, Table):
        good = rule.item.such_as
        unknown = WORDS.filter(str.isidentifier).filter(lambda name: name not in rule.names)
        return st.one_of(
            st.one_of(st.none(), st.integers(), WORDS).map(lambda value: (value, value)),
            unknown.map(lambda name: ({name: good}, good)),
            outside(rule.item).map(lambda pair: ({rule.names[0]: pair[0]}, pair[1])),
        )
    if isinstance(rule, Whole):
        whole = st.integers(rule.high + 1) | st.integers(max_value=rule.low - 1)
        whole = whole.filter(lambda value: value not in rule.also)
        values = whole | HUGE | NO_NUMBERS | st.floats()
    elif isinstance(rule, Number):
        low = [rule.low] * rule.above
        high = [rule.high] * rule.below
        values = (
            st.floats(max_value=rule.low, exclude_max=True)
            | st.floats(rule.high, exclude_min=True)
            | st.sampled_from([float("nan"), -1, -0.5, *low, *high])
            | HUGE
            | NO_NUMBERS
        )
    elif isinstance(rule, Choice):
        values = (WORDS | NO_NUMBERS | st.integers()).filter(lambda value: not rule.allows(value))
    elif isinstance(rule, Text):
        blank = st.nothing() if rule.empty else st.sampled_from(["", " ", "\t"])
        values = blank | st.just("a\0b") | st.integers() | st.floats() | st.none() | st.just(("a",))
    else:
        assert isinstance(rule, Switch)
        values = st.integers() | st.floats() | WORDS | st.none() | st.just(np.bool_(False))
    return values.map(lambda value: (value, value))


def wrong_containers(rule):
    values = st.none() | st.integers() | st.floats() | st.text("ab", max_size=3) | st.booleans()
    return (values | st.just(np.ones(2))).map(lambda value: (value, value))


def wrong_lengths(rule):
    lengths = [] if rule.least == 0 or (rule.or_none and rule.least == 1) else [rule.least - 1]
    lengths = [n for n in (*lengths, rule.most + 1) if n or not rule.or_none]
    items = inside(rule.item)
    values = st.tuples(items, st.sampled_from(lengths)).map(lambda drawn: (drawn[0],) * drawn[1])
    return values.map(lambda value: (value, value))


def wrong_items(rule):
    length = max(rule.least, 1)
    good = st.lists(inside(rule.item), min_size=length - 1, max_size=length - 1)
    return st.tuples(good, outside(rule.item), st.integers(0, length - 1)).map(
        lambda drawn: ((*drawn[0][: drawn[2]], drawn[1][0], *drawn[0][drawn[2] :]), drawn[1][1])
    )


@functools.cache
def inside(rule):
    """Draws values that are allowed."""
    if isinstance(rule, Several):
        size = {"min_size": rule.least, "max_size": min(rule.most, rule.least + 3)}
        values = st.lists(inside(rule.item), **size)
        values = values | values.map(tuple)
        return values | st.just(()) if rule.or_none else values
    if isinstance(rule, Either):
        return st.one_of(*map(inside, rule.rules))
    if isinstance(rule, Table):
        return st.dictionaries(st.sampled_from(rule.names), inside(rule.item), max_size=2)
    if isinstance(rule, Whole):
        return st.one_of(st.integers(rule.low, rule.high), *map(st.just, rule.also))
    if isinstance(rule, Number):
        ends = {"exclude_min": rule.above, "exclude_max": rule.below}
        whole = range(math.ceil(rule.low) + rule.above, math.floor(rule.high) + 1 - rule.below)
        floats = st.floats(rule.low, rule.high, **ends)
        return floats | st.sampled_from(whole) if whole else floats
    if isinstance(rule, Choice):
        return st.sampled_from([*rule.choices()] if callable(rule.choices) else rule.choices)
    if isinstance(rule, Text):
        texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
        return texts if rule.empty else texts.filter(str.strip)
    return st.booleans()


@pytest.mark.parametrize("field", RULES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_values_outside_are_refused(field, data):
    value, shown = data.draw(outside(RULES[field]))
    message = refusal_of(field, value)
    assert message.startswith(f"config.{field}")
    assert message[len(f"config.{field}")] in " [."
    assert show(shown) in message
    assert re.search("expected|there is no", message)
    assert "\n" not in message


@pytest.mark.parametrize("field", RULES)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_values_inside_are_accepted(field, data):
    value = data.draw(inside(RULES[field]))
    if field in RELATED:
        RULES[field].check(f"config.{field}", value)
    else:
        config_rules.check(config_with(field, value))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "is -1; expected a whole number from 0 to 4294967295. The nearest is 0"),
        ("train.epochs", 8.0, "is 8.0; expected a whole number from 1 to 2147483647. Did you mea"),
        ("train.epochs", True, "is True; expected a whole number from 1 to 2147483647"),
        ("train.batch_size", np.int64(8), r"is np.int64\(8\); .*Did you mean 8\?"),
        ("optimizer.lr", "0.1", "is '0.1'; expected a number above 0, .*Did you mean 0.1?"),
        (
            "optimizer.lr",
            float("nan"),
            "is nan; expected a number above 0, at most 1000, such as 0",
        ),
        ("optimizer.power", -3, "is -3.*; expected a number from 0 to 100. The nearest is 0"),
        ("model.dropout", 1.5, "is 1.5; expected a number of 0 or more, below 1"),
        ("model.downsample", 3, "is 3; expected one of 1, 2"),
        ("model.downsample", True, "is True; expected one of 1, 2"),
        ("model.memory.hard", "true", "is 'true'; expected True or False. Did you mean True?"),
        ("model.activation", "none", "is 'none'; expected one of 'relu', 'leaky_relu'"),
        (
            "model.compute_dtype",
            "float16",
            "is 'float16'; expected one of 'float32', 'bfloat16'",
        ),
        ("data.name", "foldr", "is 'foldr'; expected one of 'ade20k'.*Did you mean 'folder'?"),
        ("data.name", "images", "is 'images'; expected one of"),
        ("data.name", "../folder", "is '../folder'; expected one of"),
        ("data.root", Path("/data"), r"is Posix.*; expected text. Did you mean '/data'\?"),
        ("data.root", None, r"is None; expected text. Did you mean ''\?"),
        ("data.class_names", ("only",), r"is \('only',\); expected 2 to 254 names, one per class"),
        (
            "data.class_names",
            tuple(map(str, range(255))),
            r"is .*\.\.\. \(.*ers\); expected 2",
        ),
        ("augment.crop", 96, r"is 96; expected \(height, width\), .* Did you mean \(96, 96\)\?"),
        ("augment.crop", (96,), r"is \(96,\); expected \(height, width\), each a whole number"),
        ("augment.crop", [96, 0], r"\[1\] is 0; expected a whole number from 1"),
        ("eval.scales", 1.0, r"is 1.0; expected 1 to 100 factors, .* Did you mean \(1.0,\)\?"),
        ("data.palette", ((1, 2, 3), (0, 0, 256), (0, 0, 0)), r"\[1\]\[2\] is 256; expected a wh"),
        ("optimizer.multipliers", {"backbones": (1, 1)}, r".backbones is .*Did you mean backbone"),
        ("optimizer.multipliers", {"backbon/stem_0": (1, 1)}, r".backbon/stem_0 is .*no 'backbon/"),
        ("optimizer.multipliers", {"backbone": (1, -1)}, r".backbone\[1\] is -1; expected a numb"),
        ("model.memory", 3, "is 3; expected a group of fields: model.memory.enabled, "),
    ],
)
def test_what_is_said(field, value, message):
    assert re.match(f"config.{re.escape(field)} ?{message}", refusal_of(field, value))


def test_a_number_that_python_refuses_to_write():
    message = refusal_of("train.epochs", 10**5000)
    assert message.startswith("config.train.epochs is a value too large to be shown; expected")


# ---- Fields that are missing, or too many --------------------------------------------------------


def test_a_field_too_many_is_answered_with_the_nearest():
    config = get_config()
    config.train.batchsize = 4
    with pytest.raises(UserError, match=r"^config.train.batchsize is 4, but .*config.train.batch_"):
        config_rules.check(config)


def test_missing_fields_are_all_named():
    config = get_config()
    del config.eval["canvases"]
    del config["sharding"]["fsdp"]
    del config["seed"]
    with pytest.raises(UserError) as caught:
        config_rules.check(config)
    message = str(caught.value)
    assert message.startswith(
        "config.seed is missing, and so is config.sharding.fsdp, config.eval.canvases; "
    )
    assert "made from an older one lacks" in message


def test_a_placeholder_without_a_value():
    config = get_config()
    config.data.num_train = ml_collections.config_dict.required_placeholder(int)
    with pytest.raises(UserError, match=r"^config.data.num_train is a placeholder without"):
        config_rules.check(config)


# ---- Names that are found -----------------------------------------------------------------------


def modules_of(package):
    for info in pkgutil.iter_modules(package.__path__):
        yield info.name, importlib.import_module(f"{package.__name__}.{info.name}")


def test_the_backbones_are_those_of_the_modules():
    found = {
        name: module
        for module, content in modules_of(memseg_jax.models)
        for name in getattr(content, "VARIANTS", ())
    }
    assert memseg_jax.models.backbones() == found


def test_the_data_sets_are_those_of_the_modules():
    found = {n for n, m in modules_of(memseg_jax.data) if callable(getattr(m, "open_split", None))}
    assert set(memseg_jax.data.data_sets()) == found


def test_the_parts_of_the_models_are_those_of_the_methods():
    methods = [Segmentor, Plain, MCIBI, MCIBIPlusPlus]
    assert set(methods[1:]) == set(Segmentor.__subclasses__())
    sources = "".join(inspect.getsource(method.setup) for method in methods)
    assigned = re.findall(r"self\.(\w+) = ", sources)
    assert set(memseg_jax.models.PARTS) == {"backbone", *assigned}
