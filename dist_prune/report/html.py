"""Rendering of self-contained HTML pages from templates that escape all values.

All pages share one stylesheet, one script and one head (``templates/base.html.j2``, ``templates/macros.html.j2``). A
page asks nobody for anything: its content security policy allows images in the page and this script alone.
"""

import base64
import hashlib
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dist_prune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": script, "script_digest": digest}
    return environment


def render(template: str, **values: Any) -> str:
    """A page from a template.

    Args:
        template: File name in ``templates/``.
        values: The values that the template uses. It escapes them.

    Returns:
        The page as HTML, with its stylesheet and its script inside.

    Raises:
        jinja2.UndefinedError: The template uses a value that is missing.
    """
    return _environment().get_template(template).render(values)
