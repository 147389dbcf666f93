"""The result of a run as rows of text, for the terminal and for the report page."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from dist_prune.config.recipe import selected_on_test
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training.timing_noise import speedup_text

KINDS = ("dense", "pruned", "repaired", "finetuned")  # networks of a run; repaired: with ``repair.method`` only
SHARES = ("top1", "top5", "knn")  # figures that are shares of images in percent
REDUCED = ("sum", "max", "min", "rows", "gradients")  # collectives that reduce their payload; the others copy it


# Event -> its text in the report; the fields are the event's own. All other events are sentences already.
EVENT_TEXTS = {
    "skipped": "done in an earlier start, skipped",
    "resumed": "resumed after an interruption",
    "taken": "taken from {from}",
    "replayed": "the plan {plan} is replayed",
    "new weights": "re-initialised after pruning, as the released code does: {layers}",
    "nothing removed": "the plan removes nothing",
    "not needed": "not finetuned, pruning cost only {drop} points of top-1",
    "not finite": "some outputs of the {network} network are not finite",
    "target missed": "target missed: {why}",
    "times not reliable": "measured times are not reliable {why}",
}


def kinds_of(body: Mapping[str, Any]) -> list[str]:
    """The networks that a report or a metrics file has figures of, in the order of ``KINDS``."""
    return [name for name in KINDS if name in body]


def task_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a report says about its task (see ``Task.description``); reports without it are of classifications."""
    return body.get("task") or CLASSIFICATION.description()


def figure_name(body: Mapping[str, Any]) -> str:
    """The primary figure of a report in words, without its unit."""
    task = task_of(body)
    return str(task["titles"][task["primary"]]).removesuffix(" %")


def figure_text(body: Mapping[str, Any], value: float) -> str:
    """A value of the primary figure with its unit."""
    task = task_of(body)
    return f"{value:.2f} %" if str(task["titles"][task["primary"]]).endswith(" %") else f"{value:.4g}"


def loss_title(primary: str) -> str:
    """What the loss of a task is called in plots; ``primary`` is the key of its primary figure."""
    return "cross-entropy" if primary == CLASSIFICATION.primary else "loss"


def standard_error(body: Mapping[str, Any], kind: str, key: str) -> float | None:
    """The standard error of a share of images in percent, sqrt(p (100 - p) / n); None for other figures.

    Args:
        body: The body of report.json.
        kind: A network of it.
        key: Name of a figure.
    """
    value, images = body[kind].get(key), body[kind].get("images")
    if key not in SHARES or value is None or not images or not 0 <= value <= 100:
        return None
    return (value * (100 - value) / images) ** 0.5


def metric_rows(body: Mapping[str, Any], errors: bool = False) -> list[tuple[str, list[str]]]:
    """The rows of the table of figures.

    Args:
        body: The body of report.json.
        errors: Whether shares of images have their standard error, and there is a row with the number of images.

    Returns:
        (label, cells for the networks of ``kinds_of``) of each row.
    """
    kinds = kinds_of(body)

    def cell(kind: str, key: str, title: str) -> str:
        value, error = body[kind][key], standard_error(body, kind, key) if errors else None
        text = f"{value:.2f}" if title.endswith("%") else f"{value:.4g}"
        return text if error is None else f"{text} ± {error:.2f}"

    rows = [
        (title, [cell(kind, key, title) for kind in kinds])
        for key, title in task_of(body)["titles"].items()
        if key in body["dense"]
    ]
    if errors and "images" in body["dense"]:
        rows.append(("images", [f"{body[k]['images']:,}" for k in kinds]))
    rows.append(("loss", [_loss(body[k]["loss"]) for k in kinds]))
    for key, unit, label in (
        *((cost.name, cost.divisor, cost.label) for cost in report_costs() if cost.name in body["dense"]),
        ("size_bytes", 1e3, "file (kB)"),
    ):
        dense = body["dense"][key]
        rows.append((label, [_against(body[k][key], dense, unit) for k in kinds]))
    if "sparse" in body["dense"]:
        rows += _sparse_rows(body)
    for batch, first in body["dense"]["latency"].items():
        times = [body[k]["latency"][batch] for k in kinds]
        rows.append((f"ms, batch {batch}", [f"{t['ms']:.2f}" for t in times]))
        rows.append((f"speed-up, batch {batch}", ["", *(speedup_text(first, t) for t in times[1:])]))
        rows.append((f"images/s, batch {batch}", [f"{t['images_per_s']:.0f}" for t in times]))
    return rows


def _sparse_rows(body: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows for block masks: weights pruned, sizes of sparse files, MACs of weights that are not masked."""
    sparse = [body[k]["sparse"] for k in kinds_of(body)]
    return [
        ("weights pruned %", [f"{s['pruned_percent']:.2f}" for s in sparse]),
        ("CSR file (MiB)", [f"{s['csr_bytes'] / 2**20:.3f}" for s in sparse]),
        ("dense weights (MiB)", [f"{s['dense_bytes'] / 2**20:.3f}" for s in sparse]),
        ("MACs not on masked zeros (M)", [_against(s["masked_macs"], sparse[0]["masked_macs"], 1e6) for s in sparse]),
    ]


def event_text(event: Mapping[str, Any]) -> str:
    """An event of a stage in one line of plain English, with its other details in parentheses.

    Args:
        event: ``stage`` (label), ``event`` (a key of ``EVENT_TEXTS``, or a sentence), and details.
    """
    template = EVENT_TEXTS.get(event["event"], "")
    values = {key: _detail(value) for key, value in event.items()}
    used = {key for _, key, _, _ in Formatter().parse(template) if key}
    if not template or not used <= values.keys():
        template, used = "{event}", {"event"}
    details = ", ".join(f"{key} {value}" for key, value in values.items() if key not in {"stage", "event", *used})
    return f"{values['stage']}: {template.format_map(values)}" + (f" ({details})" if details else "")


def _detail(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def records(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """Turn dicts into a table.

    Args:
        lines: The rounds of report.json, or rows of the method's table. A line may lack keys that others have.

    Returns:
        Column heads, and rows of cells; None if there are no lines.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    return (names, [[_cell(line.get(name)) for name in names] for line in lines]) if lines else None


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, int | float) else str(value)


def search_text(body: Mapping[str, Any]) -> str:
    """What a run's search found, in one sentence; empty if there was none.

    Args:
        body: The body of report.json.
    """
    search = body.get("search")
    if not search:
        return ""
    if search["solver"] == "knapsack":
        return "ratios by a knapsack: the largest sum of importance within the target"
    winner, start = search["winner"], search.get("uniform")
    uniform = f", uniform {figure_text(body, start['figure'])}" if start else ""
    work = f"; {search['forward_passes']:,} forward passes" + (f", {search['seconds']:,} s" if start else "")
    source = f" of {search['from']}" if "from" in search else ""
    return (
        f"search{source}: candidate {winner['number']} ({winner['origin']}) of {search['candidates']}, "
        f"{figure_name(body)} {figure_text(body, winner['figure'])}{uniform}, on {search['judged_on']}{work}"
    )


def candidates(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The table of a search's candidates, those of its front marked; None if there are none."""
    search = body.get("search") or {}
    front = {line["number"] for line in search.get("front", [])}
    shown = [
        {**{key: one for key, one in line.items() if key != "share"}, "front": "yes" if line["number"] in front else ""}
        for line in search.get("lines", [])
    ]
    return records(shown)


def communication(body: Mapping[str, Any]) -> list[list[str]]:
    """Rows of stage, collective, calls and bytes: one for each collective of each stage.

    Args:
        body: The body of report.json.
    """
    return [
        [stage, word, f"{count['calls']:,}", f"{count['bytes']:,}"]
        for stage, words in (body.get("communication") or {}).items()
        for word, count in words.items()
    ]


def warning_events(body: Mapping[str, Any]) -> list[str]:
    """The texts of the events that begin with WARNING, which the page shows at its top."""
    return [str(event["event"]) for event in body.get("events", []) if str(event["event"]).startswith("WARNING")]


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _against(value: float, dense: float, unit: float) -> str:
    change = f" ({100 * (value / dense - 1):+.1f} %)" if value != dense else ""
    return f"{value / unit:,.2f}{change}"


def table(body: Mapping[str, Any]) -> str:
    """The result of a run as a table for the terminal.

    Args:
        body: The body of report.json.
    """
    kinds = kinds_of(body)
    lines = [("", kinds), *metric_rows(body)]
    widths = [max(len(line[0]) for line in lines)]
    widths += [max(len(cells[i]) for _, cells in lines) for i in range(len(kinds))]
    text = [
        "  ".join([label.ljust(widths[0]), *(cell.rjust(widths[i + 1]) for i, cell in enumerate(cells))])
        for label, cells in lines
    ]
    more = [*_rounds(body), *filter(None, [search_text(body), traffic_text(body)]), *warning_events(body)]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", target_text(body), *more])


def _rounds(body: Mapping[str, Any]) -> list[str]:
    """A line of text for each round."""
    primary = task_of(body)["primary"]

    def kept(line: Mapping[str, Any]) -> str:
        return ", ".join(f"{line[cost.name]:.1%} of the {cost.name}" for cost in report_costs() if cost.name in line)

    return [
        f"round {line['round']}: {kept(line)}"
        f", {figure_name(body)} {figure_text(body, line[f'pruned_{primary}'])} pruned, {_repaired(body, line)}"
        f"{figure_text(body, line[f'finetuned_{primary}'])} after {line['epochs']} epochs"
        for line in body.get("rounds", [])
    ]


def _repaired(body: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    value = line.get(f"repaired_{task_of(body)['primary']}")
    return "" if value is None else f"{figure_text(body, value)} repaired, "


def traffic_text(body: Mapping[str, Any]) -> str:
    """Bytes that each rank passed to collectives, by stage; empty for a single process.

    Args:
        body: The body of report.json.
    """
    per_stage = []
    for stage, words in (body.get("communication") or {}).items():
        reduced = sum(count["bytes"] for word, count in words.items() if word in REDUCED)
        rest = sum(count["bytes"] for word, count in words.items() if word not in REDUCED)
        if reduced + rest >= 1000:
            per_stage.append(f"{stage} {_size(reduced)} + {_size(rest)}")
    run = f"{body['recipe']['method']['name']} on {body['recipe']['backbone']['name']}"
    return f"communication of each rank ({run}), all-reduced + other: {', '.join(per_stage)}" if per_stage else ""


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def target_text(body: Mapping[str, Any]) -> str:
    """The requested and the achieved shares in one line.

    Args:
        body: The body of report.json.
    """
    achieved = ", ".join(f"{share:.1%} of the {name}" for name, share in body["achieved"].items())
    requested = ", ".join(f"{share:.1%} of the {name}" for name, share in body["target"].items())
    test_selection = "".join(f"; {peek.upper()}" for peek in selected_on_test(body["recipe"]))
    block_note = "; masked blocks of weights save MACs on paper only: they run as slow as dense ones"
    runs = body.get("reruns")
    primary = task_of(body)["primary"]
    unit = figure_text(body, 0.0).partition(" ")[2]  # %, or none
    rerun_text = f"; {len(runs[primary])} finetunings: {runs['mean']:.2f} ± {runs['std']:.2f} {unit}" if runs else ""
    block_text = block_note if "sparse" in body["dense"] else ""
    gone = body["plan"].get("blocks_removed") or []
    depth_text = f"; {len(gone)} residual blocks gone: {', '.join(gone)}" if gone else ""
    return (
        f"kept: {achieved}"
        + (f" (asked: at most {requested})" if requested else "")
        + depth_text
        + block_text
        + rerun_text
        + test_selection
    )


def time_keys(batches: Sequence[str]) -> dict[str, str]:
    """Batch size -> end of the keys of its times in a row: empty if it is the only one, else with the batch size.

    Args:
        batches: The batch sizes that are compared.
    """
    return {batch: "" if len(batches) == 1 else f"_{batch}" for batch in batches}
