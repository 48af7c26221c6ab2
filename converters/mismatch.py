"""Says where the tensors of a file and those of a model do not agree."""

from collections.abc import Mapping

from memseg_jax.runtime.text import first_few

Shape = tuple[int, ...]


def mismatches(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """Lists the tensors that are missing, unknown, or of another shape.

    Args:
        found: {name: shape} in the file.
        wanted: {name: shape} in the model, under the names that the file should have.

    Returns:
        Indented lines for a message, with the count and the first few of each kind; none if all
        agree.
    """
    missing = [f"{name} {list(wanted[name])}" for name in wanted if name not in found]
    extra = [f"{name} {list(found[name])}" for name in found if name not in wanted]
    other = [
        f"{name} {list(found[name])}, expected {list(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    return [
        *_section("missing in the file", missing),
        *_section("not in the model", extra),
        *_section("of another shape", other),
    ]


def _section(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    return [f"  {len(entries)} {title}:", *(f"    {line}" for line in first_few(entries))]
