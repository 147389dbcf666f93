"""docs/api.md from the docstrings of the public names, and the running of its examples."""

import doctest
import inspect
import re
from collections.abc import Iterator
from typing import Any

import dist_prune

SETUP = """import torch
import torchvision

import dist_prune as dp

model = torchvision.models.resnet18(num_classes=10).eval()
images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
loader = [(images[:4], labels[:4]), (images[4:], labels[4:])]
graph = dp.trace(model, images)
scores = dp.score(model, graph, "l1")
plan = dp.select(scores, graph, target={"macs": 0.5}, round_to=8)
small = dp.prune(model, plan)"""
ORDER = (
    "trace", "score", "select", "search", "prune", "prune_", "repair", "carry", "costs", "latency", "save", "load",
    "Scores", "Plan", "DependencyGraph", "ChannelGroup", "HookPoint", "Method", "RankingMethod", "ScoringContext",
    "Statistic", "State", "Cost", "PruneError",
)  # fmt: skip
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields|Example):$")


def page() -> str:
    """The generated part of docs/api.md."""
    missing = {name for name in dist_prune.__all__ if not name.startswith("_")} ^ set(ORDER)
    assert not missing, f"tests/support/api_page.py: ORDER and dist_prune.__all__ differ by {missing}"
    intro = f"The examples below use these names:\n\n```python\n{SETUP}\n```"
    return "\n\n".join([intro, *(part for name in ORDER for part in entry(name, getattr(dist_prune, name)))])


def entry(name: str, thing: Any) -> Iterator[str]:
    """Heading, signature and text of a public name; the public members of a class of more than fields."""
    yield f"## `{name}`"
    if not (isinstance(thing, type) and (issubclass(thing, Exception) or inspect.isabstract(thing))):
        yield f"```python\n{signature(name, thing)}\n```"
    yield text_of(thing)
    if isinstance(thing, type):
        for member, value in vars(thing).items():
            plain = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
            if not member.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
                call = signature(f"{name}.{member}", plain) if not isinstance(value, property) else f"{name}.{member}"
                yield f"**`{member}`**\n\n```python\n{call}\n```"
                yield text_of(plain)


def signature(name: str, thing: Any) -> str:
    """A signature on one line, without the modules of its types."""
    shown = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", str(inspect.signature(thing)))
    shown = re.sub(
        r"<factory>|<class '[^']*'>|<function [^>]*>+ at 0x\w+>|<function [^>]* at 0x\w+>",
        "...",
        shown.replace("~", "").replace("'", ""),
    )
    return f"{name}{shown}"


def text_of(thing: Any) -> str:
    """A docstring of Google's style as Markdown: sections become bold words, their entries lists."""
    lines, section = [], ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if match := SECTION.match(line):
            section = match[1]
            lines += ["```python"] if section == "Example" else [f"*{section}*", ""]
        elif section == "Example":
            lines.append(line.removeprefix("    "))
        elif section in ("Args", "Attributes", "Raises") and re.match(r" {4}\S", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name.lstrip('*')}`: {rest}")
        elif section in ("Returns", "Yields"):
            lines.append(line.removeprefix("    "))
        else:
            lines.append(line.replace("        ", "  ", 1))
    if section == "Example":
        lines.append("```")
    return re.sub(r"(?<!`)``(?!`)", "`", "\n".join(lines)).strip()


def failures() -> list[str]:
    """Run every example of every public docstring, in the order of the page; what failed."""
    names: dict[str, Any] = {}
    exec(SETUP, names)
    found = []
    for name in ORDER:
        thing = getattr(dist_prune, name)
        for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs=names):
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            test.globs = names
            runner.run(test, out=report.append, clear_globs=False)
            found += [f"{name}: {''.join(report)}"] if runner.failures else []
    return found


def examples() -> list[str]:
    """The public names whose docstring has an example."""
    finder = doctest.DocTestFinder(recurse=False)
    return [n for n in ORDER if any(t.examples for t in finder.find(getattr(dist_prune, n), n, globs={}))]
