"""Kinds of rules: what one value of a config may be, and what is said of one that it may not be.

A rule has `expected`, which completes "expected ...", and `check(name, value)`. Values are plain
Python: what passes can be written as JSON. A Boolean is not a number here, although it is one in
Python.
"""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from memseg_jax.errors import UserError
from memseg_jax.runtime.suggest import did_you_mean, nearest

_LONGEST = 200  # characters of a value that a message shows


def refusal(name: str, value: Any, expected: str, near: str = "") -> UserError:
    """Returns the error about a value that a field may not have.

    Args:
        name: the field, such as "config.optimizer.lr".
        value: what it holds.
        expected: what is allowed.
        near: a sentence without its full stop about what was probably meant; "" if that is unknown.
    """
    return UserError(f"{name} is {show(value)}; expected {expected}" + (near and f". {near}"))


def show(value: Any) -> str:
    """Returns a value on one line, as Python writes it, and cut if it is long."""
    try:
        text = repr(value.to_dict() if hasattr(value, "to_dict") else value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a value too large to be shown"
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def is_group(value: Any) -> bool:
    """Whether a value is a group of fields."""
    return hasattr(value, "items")


class Rule:
    """What a value may be; the base of all kinds.

    Attributes:
        expected: completes "expected ...".
    """

    expected: str

    def allows(self, value: Any) -> bool:
        """Whether the value is allowed."""
        raise NotImplementedError

    def near(self, value: Any) -> str:
        """Returns a sentence, without its full stop, about what was meant, or "".

        Args:
            value: one that is not allowed.
        """
        return ""

    def check(self, name: str, value: Any) -> None:
        """Refuses a value that is not allowed.

        Args:
            name: the field, such as "config.optimizer.lr".
            value: what it holds.

        Raises:
            UserError: begins with the name, and says what is allowed.
        """
        if not self.allows(value):
            raise refusal(name, value, self.expected, self.near(value))


@dataclasses.dataclass(frozen=True)
class Switch(Rule):
    """True or False."""

    expected = "True or False"

    def allows(self, value: Any) -> bool:  # noqa: D102 (as in the base class, here and below)
        return isinstance(value, bool)

    def near(self, value: Any) -> str:  # noqa: D102
        meant = {"true": True, "1": True, "false": False, "0": False}
        word = str(value).lower() if isinstance(value, str | int) else ""
        return f"Did you mean {meant[word]}?" if word in meant else ""


@dataclasses.dataclass(frozen=True)
class Whole(Rule):
    """A whole number from `low` to `high`, both included, or one of `also`."""

    low: int
    high: int
    also: tuple[int, ...] = ()

    @property
    def expected(self) -> str:  # noqa: D102
        return " or ".join([f"a whole number from {self.low} to {self.high}", *map(str, self.also)])

    def allows(self, value: Any) -> bool:  # noqa: D102
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return self.low <= value <= self.high or value in self.also

    def near(self, value: Any) -> str:  # noqa: D102
        number = _number(value)
        if number is None:
            return ""
        if number == math.floor(number) and self.allows(int(number)):
            return f"Did you mean {int(number)}?"
        return f"The nearest is {round(min(max(number, self.low), self.high))}"


@dataclasses.dataclass(frozen=True)
class Number(Rule):
    """A number between `low` and `high`.

    Attributes:
        low: the smallest value.
        high: the largest value.
        above: whether `low` itself is too small.
        below: whether `high` itself is too large.
        such_as: an example, for values without a nearest valid one.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    such_as: float | None = None

    @property
    def expected(self) -> str:  # noqa: D102
        example = "" if self.such_as is None else f", such as {self.such_as:g}"
        if not self.above and not self.below:
            return f"a number from {self.low:g} to {self.high:g}{example}"
        low = f"above {self.low:g}" if self.above else f"of {self.low:g} or more"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return f"a number {low}, {high}{example}"

    def allows(self, value: Any) -> bool:  # noqa: D102
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Written like this, NaN fails, too.
        above = value > self.low if self.above else value >= self.low
        below = value < self.high if self.below else value <= self.high
        return above and below

    def near(self, value: Any) -> str:  # noqa: D102
        number = _number(value)
        if number is None:
            return ""
        if self.allows(number):
            return f"Did you mean {number!r}?"
        end = min(max(number, self.low), self.high)
        return f"The nearest is {end:g}" if self.allows(end) else ""


@dataclasses.dataclass(frozen=True)
class Choice(Rule):
    """One of some values.

    Attributes:
        choices: the values; or a function that returns them, if they have to be looked up.
    """

    choices: tuple[Any, ...] | Callable[[], Iterable[str]]

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(self.choices() if callable(self.choices) else self.choices)

    @property
    def expected(self) -> str:  # noqa: D102
        return f"one of {', '.join(map(repr, self._values))}"

    def allows(self, value: Any) -> bool:  # noqa: D102
        return any(type(value) is type(choice) and value == choice for choice in self._values)

    def near(self, value: Any) -> str:  # noqa: D102
        meant = nearest(str(value), map(str, self._values)) if isinstance(value, str | int) else ()
        meant = [repr(choice) for name in meant for choice in self._values if str(choice) == name]
        return f"Did you mean {' or '.join(meant)}?" if meant else ""


@dataclasses.dataclass(frozen=True)
class Text(Rule):
    """Text, such as a path.

    Attributes:
        empty: whether it may be empty, or blank.
    """

    empty: bool = True

    @property
    def expected(self) -> str:  # noqa: D102
        return "text" if self.empty else "text that is not empty"

    def allows(self, value: Any) -> bool:  # noqa: D102
        if not isinstance(value, str) or "\0" in value:  # the end of the text for a file system
            return False
        return self.empty or bool(value.strip())

    def near(self, value: Any) -> str:  # noqa: D102
        if value is None and self.empty:
            return "Did you mean ''?"
        if isinstance(value, os.PathLike | numbers.Number):
            return f"Did you mean {show(str(value))}?"
        return ""


@dataclasses.dataclass(frozen=True)
class Several(Rule):
    """A tuple or a list of values of one kind.

    Attributes:
        item: the rule of each.
        least: the fewest.
        most: the most.
        names: what they are called, such as "(height, width)".
        such_as: an example.
        or_none: whether there may be none at all, whatever `least` says.
    """

    item: Rule
    least: int
    most: int
    names: str
    such_as: tuple[Any, ...]
    or_none: bool = False

    @property
    def expected(self) -> str:  # noqa: D102
        count = f"{self.least} to {self.most} " if self.most > self.least else ""
        none = " or ()" if self.or_none else ""
        return f"{count}{self.names}{none}, each {self.item.expected}, such as {self.such_as}"

    def allows(self, value: Any) -> bool:  # noqa: D102
        return self._has_length(value) and all(map(self.item.allows, value))

    def near(self, value: Any) -> str:  # noqa: D102
        if self.item.allows(value) and self.least <= 2:  # the brackets were left out
            return f"Did you mean {(value,) * max(self.least, 1)}?"
        return ""

    def check(self, name: str, value: Any) -> None:
        """Refuses a value, and names the item that is to blame, if one is."""
        if not self._has_length(value):
            raise refusal(name, value, self.expected, self.near(value))
        for index, item in enumerate(value):
            self.item.check(f"{name}[{index}]", item)

    def _has_length(self, value: Any) -> bool:
        if not isinstance(value, tuple | list):
            return False
        return self.least <= len(value) <= self.most or (self.or_none and not value)


@dataclasses.dataclass(frozen=True)
class Either(Rule):
    """A value that one of some rules allows; the first of them says what was probably meant."""

    rules: tuple[Rule, ...]

    @property
    def expected(self) -> str:  # noqa: D102
        return "; or ".join(rule.expected for rule in self.rules)

    def allows(self, value: Any) -> bool:  # noqa: D102
        return any(rule.allows(value) for rule in self.rules)

    def near(self, value: Any) -> str:  # noqa: D102
        return self.rules[0].near(value)


@dataclasses.dataclass(frozen=True)
class Table(Rule):
    """A group of fields whose names are free within limits.

    Attributes:
        names: what the names may be; a number after an underscore may follow. So may a "/" with
            anything after it, and what has a "*" is not looked up: for paths and patterns of them.
        item: the rule of every value.
    """

    names: tuple[str, ...]
    item: Rule

    @property
    def expected(self) -> str:  # noqa: D102
        return f"a group of fields, each {self.item.expected}"

    def allows(self, value: Any) -> bool:  # noqa: D102
        if not is_group(value):
            return False
        return all(self._known(key) and self.item.allows(item) for key, item in value.items())

    def check(self, name: str, value: Any) -> None:
        """Refuses a value, and names the field of the group that is to blame."""
        if not is_group(value):
            raise refusal(name, value, self.expected)
        for key, item in value.items():
            if not self._known(key):
                raise UserError(
                    f"{name}.{key} is {show(item)}, but there is no {key!r}. "
                    + did_you_mean(str(key), self.names)
                )
            self.item.check(f"{name}.{key}", item)

    def _known(self, key: Any) -> bool:
        head = str(key).split("/")[0]
        return "*" in head or head in self.names or re.sub(r"_\d+$", "", head) in self.names


def _number(value: Any) -> int | float | None:
    """The finite number that a value stands for, as text or as NumPy's; None if there is none."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Number):
        return None
    try:
        number = float(value)
        if not math.isfinite(number):
            return None
        return int(value) if isinstance(value, numbers.Integral) else number
    except (TypeError, ValueError, OverflowError):
        # Text that is not a number, or a whole number beyond all floats.
        return value if isinstance(value, int) else None
