"""Parameters by pattern, and what it means that some of them are frozen (`config.train.freeze`).

A frozen parameter keeps its value: it has no gradient, no weight decay and no momentum, and none of
the arithmetic that only its gradient would need is done. A batch normalisation whose parameters are
both frozen is also taken out of training: it normalises with its running statistics, as in
evaluation, and they stay as they are. Otherwise the frozen layers would still compute something
else in every step.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from memseg_jax.errors import UserError
from memseg_jax.models.layers import BatchNorm
from memseg_jax.runtime.suggest import did_you_mean


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern selects a parameter.

    Args:
        path: of the parameter, such as "backbone/layer1_0/conv1/conv/kernel".
        pattern: such a path, or that of a module, which selects all that is in it; "*" stands for
            any text, "/" included, "?" for any character, "[12]" for one of some characters.
    """
    return any(fnmatch.fnmatchcase(path, form) for form in (pattern, f"{pattern}/*"))


def check_patterns(field: str, patterns: Iterable[str], params: Mapping[str, Any]) -> None:
    """Refuses a pattern that selects nothing.

    Args:
        field: where it is from, such as "config.train.freeze".
        patterns: of parameter paths, see `matches`.
        params: the parameters of the model; only their names matter.

    Raises:
        UserError: names the pattern, and the nearest module.
    """
    paths = list(flatten_dict(params, sep="/"))
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            depth = pattern.count("/") + 1
            modules = dict.fromkeys("/".join(path.split("/")[:depth]) for path in paths)
            raise UserError(
                f"{field} names {pattern!r}, but the model has no such module or parameter. "
                + did_you_mean(pattern, modules)
            )


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen part of a model.

    Attributes:
        patterns: `config.train.freeze`.
    """

    patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Frozen":
        """The frozen part that a config asks for."""
        return cls(tuple(config.train.freeze))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def __contains__(self, path: str) -> bool:
        return any(matches(path, pattern) for pattern in self.patterns)

    def check(self, params: Mapping[str, Any]) -> None:
        """Refuses patterns that select nothing, or everything.

        Args:
            params: the parameters of the model; only their names matter.

        Raises:
            UserError: says which pattern, or that nothing would be learned.
        """
        check_patterns("config.train.freeze", self.patterns, params)
        if all(path in self for path in flatten_dict(params, sep="/")):
            raise UserError(
                f"config.train.freeze is {self.patterns}, which is every parameter of the model: "
                "nothing would be learned. Leave out some."
            )

    def trained(self, params: Any) -> Any:
        """Returns the tree of parameters with True where they are trained."""
        return path_aware_map(lambda path, _: "/".join(path) not in self, params)

    def without_gradients(self, params: Any) -> Any:
        """Returns the parameters, of which the frozen ones count as constants."""
        if not self:
            return params
        return jax.tree.map(
            lambda x, trained: x if trained else jax.lax.stop_gradient(x),
            params,
            self.trained(params),
        )

    def statistics(self, before: Any, after: Any) -> Any:
        """Returns the running statistics after a step, those of frozen normalisations as before.

        They do not move, but a mean over parts of a batch may round them.

        Args:
            before: `batch_stats` before the step.
            after: the same after it.
        """
        if not self:
            return after
        flat = flatten_dict(after, sep="/")
        kept = {path for path in flat if self._has_norm(path.rpartition("/")[0])}
        old = flatten_dict(before, sep="/")
        merged = {path: old[path] if path in kept else new for path, new in flat.items()}
        return unflatten_dict(merged, sep="/")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In this context, frozen batch normalisations run as in evaluation."""
        if not self:
            yield
            return

        def intercept(
            call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            module = context.module
            is_call = isinstance(module, BatchNorm) and context.method_name == "__call__"
            if is_call and self._has_norm("/".join(module.path)):
                kwargs = {**kwargs, "train": False}
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            yield

    def _has_norm(self, path: str) -> bool:
        """Whether the batch normalisation at a path is frozen as a whole."""
        return f"{path}/scale" in self and f"{path}/bias" in self
