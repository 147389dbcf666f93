"""Keys that came after run directories were first written, and what their absence means. Knows no torch."""

from collections.abc import Mapping
from typing import Any

# Keys that came after run directories were first written: their defaults are what a directory without them means.
ADDED: dict[str, Any] = {
    "backbone.checkpoint_key": "auto", "backbone.checkpoint_skip": [], "data.class_map": None, "data.class_order": None,
    "data.layout": None, "target.latency_tolerance": 0.05,
}  # fmt: skip
ADDED_TO: dict[str, dict[str, Any]] = {  # the same of methods' options
    **{
        name: {"method.normalise": True}
        for name in ("dirichlet", "fisher", "l1", "l2", "mint", "random", "sensitivity", "shapley")
    },
    "entropy": {"method.normalise": True, "method.taps": "consumed"},
}


def without_added(fields: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Dotted keys or sections of a resolved recipe, less the keys of ADDED that have their default values."""
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    for key, default in (ADDED | ADDED_TO.get(method, {})).items():
        if key in out and out[key] in (default, None):
            del out[key]
        section, _, leaf = key.partition(".")
        inner = out.get(section)
        if isinstance(inner, dict) and inner.get(leaf) == default:
            inner.pop(leaf, None)
    return out
