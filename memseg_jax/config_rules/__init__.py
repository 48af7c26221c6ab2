"""Checks a config before anything is made, compiled or written.

`fields` has one rule per field, `relations` what has to fit together. What only the data, the
devices or the model can tell is left to the code that opens or builds them.

The rules sit above the models and the data sets, whose names they look up, and below the modes,
each of which asks `check` first. They import neither JAX nor NumPy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections.config_dict import RequiredValueError

from memseg_jax.config_rules.fields import RULES
from memseg_jax.config_rules.kinds import is_group, refusal, show
from memseg_jax.config_rules.relations import RELATIONS
from memseg_jax.errors import UserError
from memseg_jax.runtime.suggest import did_you_mean


def check(config: Any) -> None:
    """Refuses an invalid config.

    Args:
        config: the whole config, a `ConfigDict`.

    Raises:
        UserError: a field is missing, is not known, or has a value that it may not have. The
            message begins with "config.<field>" and has the value, what is allowed, and what was
            probably meant.
    """
    values = dict(_values(config))
    for field in sorted(values.keys() - RULES.keys()):
        inside = [name for name in RULES if name.startswith(f"{field}.")]
        if inside:
            expected = f"a group of fields: {', '.join(inside)}"
            raise refusal(f"config.{field}", values[field], expected)
        raise UserError(
            f"config.{field} is {show(values[field])}, but there is no such field. "
            + did_you_mean(field, RULES, "config.")
        )
    missing = [field for field in RULES if field not in values]
    if missing:
        raise UserError(
            f"config.{missing[0]} is missing"
            + (f", and so is config.{', config.'.join(missing[1:])}" if missing[1:] else "")
            + "; expected every field of configs/common.py. Start from its get_config(); a config "
            "that was made from an older one lacks what was added since."
        )
    for field, rule in RULES.items():
        rule.check(f"config.{field}", values[field])
    for relation in RELATIONS:
        for error in relation(config):
            raise error


def _values(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field; a group with free names is one field."""
    for key in group:
        name = f"{prefix}{key}"
        try:
            value = group[key]
        except RequiredValueError:
            raise UserError(
                f"config.{name} is a placeholder without a value; give it one, such as with "
                f"--config.{name}=VALUE"
            ) from None
        fields = list(_values(value, f"{name}.")) if is_group(value) else []
        if fields and name not in RULES:
            yield from fields
        else:
            yield name, value
