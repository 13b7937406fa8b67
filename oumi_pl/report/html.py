"""HTML pages from Jinja templates: each is one file, without network or script, and every text in it is escaped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The page that a template makes of values.

    Args:
        template: A file that may extend `base.html` and import from `parts.html`, both beside this one.
        filters: Name in the template -> function of a value.
        values: Name in the template -> value.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)
