"""A page as one HTML file: the template, its style and script, and the data that they show.

Whatever comes from data, such as the name of a class, is text: the template escapes it, the script
only ever sets text, and a policy in the page forbids all scripts but ours and all requests.
"""

import base64
import functools
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, scripts: tuple[str, ...] = (), **context: Any) -> str:
    """Makes a page.

    Args:
        template: file in `templates/`.
        scripts: JavaScript of parts of the page, run after that of the page itself.
        context: what the template names; `data` is what the script reads, JSON values, where
            numbers that are not finite become null.

    Returns:
        The text of the HTML file.
    """
    scripts = (_text("page.js"), *scripts)
    context["data"] = finite(context["data"])
    page = environment(_TEMPLATES).get_template(template)
    return page.render(
        style=_text("page.css"),
        scripts=scripts,
        hashes=hashes(scripts),
        **context,
    )


def finite(value: Any) -> Any:
    """JSON values in which NaN and infinity, which JSON does not know, are null."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def environment(templates: Path) -> Any:
    """What makes pages of the templates of a folder: all that is put into them is escaped."""
    import jinja2  # not at the top: training imports this module, and most processes never render

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def hashes(scripts: Iterable[str]) -> str:
    """The names of scripts in a page's policy: no other is run."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent, or a dash if it is not defined."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"
