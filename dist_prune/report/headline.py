"""The head of a run's page: a verdict in sentences and the large figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_prune.config.recipe import selected_on_test
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.report import tables
from dist_prune.training.timing_noise import DOUBTFUL, speedup, speedup_text

Level = Literal["good", "doubt", "bad", "plain"]
SIGNS: dict[Level, str] = {"good": "✓", "doubt": "?", "bad": "✗", "plain": "•"}
ALIKE = 2.0  # standard errors within which two networks cannot be told apart


@dataclass(frozen=True)
class Sentence:
    """A sentence of the verdict.

    Attributes:
        level: ``good``, ``doubt``, ``bad`` or ``plain``.
        text: what it says.
    """

    level: Level
    text: str

    @property
    def sign(self) -> str:
        """The sign that stands for the level, for those who do not see its colour."""
        return SIGNS[self.level]


@dataclass(frozen=True)
class Card:
    """A large figure.

    Attributes:
        title: what it is.
        value: the figure with its unit.
        note: what it is compared with.
    """

    title: str
    value: str
    note: str = ""


def verdict(body: Mapping[str, Any]) -> list[Sentence]:
    """What a reader should know first: the target, the primary figure, the speed, and what is in doubt.

    Args:
        body: The body of report.json.
    """
    sentences = [_of_target(body), _of_figure(body), _of_speed(body)]
    sentences += [Sentence("doubt", text.removeprefix("WARNING: ")) for text in tables.warning_events(body)]
    sentences += [Sentence("doubt", f"{text[:1].upper()}{text[1:]}.") for text in selected_on_test(body["recipe"])]
    return sentences


def cost_name(name: str) -> str:
    """The name of a cost in a sentence: its unit, or what it is called."""
    return COSTS[name].unit if name in COSTS else name


def _of_target(body: Mapping[str, Any]) -> Sentence:
    missed = [str(event.get("why", "")) for event in body["events"] if event["event"] == "target missed"]
    if missed:
        return Sentence("bad", f"The target is missed: {missed[-1]}.")
    kept = ", ".join(f"{share:.1%} of the {cost_name(name)}" for name, share in body["achieved"].items())
    if body["achieved"] and all(share == 1 for share in body["achieved"].values()):
        return Sentence("bad", "The plan removes nothing: the network is as it was.")
    for name, asked in body["target"].items():
        share = body["achieved"].get(name)
        if share is not None:
            within = "" if share <= asked else " within its tolerance"
            text = f"The target is met{within}: {share:.1%} of the {cost_name(name)} left, at most {asked:.1%} asked."
            return Sentence("good", text)
    return Sentence("plain", f"No share of a cost was asked for. Left: {kept}.")


def _of_figure(body: Mapping[str, Any]) -> Sentence:
    task, name = tables.task_of(body), tables.figure_name(body)
    dense, left = (body[kind].get(task["primary"]) for kind in ("dense", "finetuned"))
    if dense is None or left is None or not (math.isfinite(dense) and math.isfinite(left)):
        return Sentence("bad", f"{name} of the dense or of the final network is not a number.")
    percent = str(task["titles"][task["primary"]]).endswith("%")
    change, digits = left - dense, "{:.2f} points" if percent else "{:.4g}"
    values = f"{tables.figure_text(body, dense)} dense, {tables.figure_text(body, left)} at the end"
    error = change_error(body, "finetuned")
    if abs(change) < (0.005 if percent else 1e-12):  # as printed
        return Sentence("good", f"{name} is that of the dense network ({values}).")
    verb = "rises" if change > 0 else "falls"
    better = (change > 0) == task.get("higher_is_better", True)
    text = f"{name} {verb} by {digits.format(abs(change))} ({values})"
    if error:
        ratio = abs(change) / error
        text += f", {ratio:.1f} standard errors"
        if ratio <= ALIKE:
            return Sentence("good" if better else "plain", f"{text}: these images cannot tell the two apart.")
    return Sentence("good" if better else "doubt", f"{text}.")


def _of_speed(body: Mapping[str, Any]) -> Sentence:
    batch, times = next(reversed(body["dense"]["latency"].items()))
    final = body["finetuned"]["latency"][batch]
    ratio = speedup(times, final)
    where = f"on {times.get('device', 'cpu')} at batch {batch}"
    if ratio is None:
        return Sentence(
            "doubt", f"Its times {where} are not reliable: other work used the machine. Nothing is said of speed."
        )
    if ratio >= 1.05:
        return Sentence("good", f"It runs {ratio:.2f} times as fast as the dense network {where}.")
    slower = "no faster than" if ratio >= 0.95 else "slower than"
    return Sentence("doubt", f"It is {slower} the dense network {where} ({ratio:.2f}x).")


def change_error(body: Mapping[str, Any], kind: str) -> float | None:
    """The standard error of the change of a share of images (top-1) from dense, in points; None for other figures.

    Both networks answer the same images, so where the answers are known only the images that one of them alone gets
    right count: with b lost and c gained of n images it is sqrt(b + c - (b - c)^2 / n) / n. Else the errors of both
    add up.

    Args:
        body: The body of report.json.
        kind: The network that is compared with the dense one.
    """
    errors = [tables.standard_error(body, name, tables.task_of(body)["primary"]) for name in ("dense", kind)]
    if None in errors:
        return None
    counts = (body.get("answers") or {}).get(kind)
    if counts:
        lost, gained, images = counts["lost"], counts["gained"], counts["images"]
        return 100 * math.sqrt(lost + gained - (lost - gained) ** 2 / images) / images
    return math.hypot(*(error for error in errors if error is not None))


def cards(body: Mapping[str, Any]) -> list[Card]:
    """The large figures: method and network, target, primary figure, speed-up at each batch, sizes.

    Args:
        body: The body of report.json.
    """
    recipe, dense, final = body["recipe"], body["dense"], body["finetuned"]
    out = [
        Card("network", recipe["backbone"]["name"], _data_text(body)),
        Card("method", recipe["method"]["name"], f"seed {body['seed']}"),
    ]
    for name, share in body["achieved"].items():
        if name in body["target"]:
            out.append(Card(f"{cost_name(name)}, asked → left", f"{body['target'][name]:.1%} → {share:.1%}"))
    out.append(_figure_card(body))
    for batch, times in dense["latency"].items():
        other = final["latency"][batch]
        text = speedup_text(times, other)
        device = str(times.get("device", "cpu")) + (f", {times['threads']} thread(s)" if "threads" in times else "")
        note = f"{times['ms']:.2f} → {other['ms']:.2f} ms, {device}"
        out.append(
            Card(
                f"speed-up, batch {batch}",
                "?" if text == DOUBTFUL else text,
                f"{text}: {note}" if text == DOUBTFUL else note,
            )
        )
    asked = set(body["target"])
    for name, unit, title in (
        *((cost.name, cost.divisor, cost.label) for cost in COSTS.values() if cost.title and cost.name in dense),
        ("size_bytes", 1e6, "file (MB)"),
    ):
        if name not in asked and final.get(name) and dense.get(name):
            share = 100 * (final[name] / dense[name] - 1)
            out.append(
                Card(title, f"{final[name] / unit:,.2f}", f"dense {dense[name] / unit:,.2f} ({share:+.1f}\u00a0%)")
            )
    return out


def _data_text(body: Mapping[str, Any]) -> str:
    data = body["recipe"].get("data") or {}
    return f"on {data['source']}" if data.get("source") else ""


def _figure_card(body: Mapping[str, Any]) -> Card:
    task, kinds = tables.task_of(body), tables.kinds_of(body)
    primary = task["primary"]
    percent = str(task["titles"][primary]).endswith("%")
    values = [body[kind].get(primary) for kind in kinds]
    texts = ["-" if value is None else f"{value:.2f}" if percent else f"{value:.4g}" for value in values]
    error = tables.standard_error(body, "finetuned", primary)
    note = " → ".join(kinds) + (f"; ± {error:.2f}" if error is not None else "")
    images = body["finetuned"].get("images")
    return Card(
        str(task["titles"][primary]), " → ".join(texts), note + (f", {images:,} images" if images is not None else "")
    )
