"""Figures of the study as a compact file, and as Markdown tables."""

import json
from pathlib import Path
from typing import Any

Body = dict[str, Any]


def read(folder: Path) -> Body:
    return {}


def load(file):
    return {}


def compact(body):
    return ""


def markdown(body):
    return ""
