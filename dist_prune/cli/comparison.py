"""The runs that ``dist-prune compare`` compares: their reports, averaged over seeds, and their papers' points."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_prune.cli.run_names import short_names, target_text
from dist_prune.config import loading, safe_parsing
from dist_prune.config.earlier_versions import rename_old_keys
from dist_prune.config.recipe import selected_on_test
from dist_prune.errors import PruneError, abbreviate, shown
from dist_prune.fileio import canonical
from dist_prune.pipeline.ledger import flatten
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.tables import standard_error, task_of, time_keys
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure
from dist_prune.training.timing_noise import DOUBTFUL, is_reliable

# A row of the table in a recipe's header: point, top-1 drop (/ top-5 drop), change of FLOPs and of parameters (- if the
# paper does not give it). Columns are two blanks apart.
PAPER_ROW = re.compile(
    r"^#\s+(\S+(?: \S+)*)\s{2,}(-?[\d.]+)(?:\s*/\s*-?[\d.]+)?\s+(?:(-[\d.]+) %|-)\s+(?:(-[\d.]+) %|-)(?:\s|$)"
)
PAPER_HEAD = re.compile(r"^#\s+(\S+(?: \S+)*)\s{2,}top-1\S* drop\s+FLOPs\s+parameters")
TOP1 = PrimaryFigure.of(CLASSIFICATION.description())
FIRST = {"run": "run", "seeds": "seeds", "backbone": "backbone", "method": "method"}
EXTRAS = ("name", "target", "seed_list")  # of CSV and page only
LAST = {"timed": "measured times", "marked": ""}


def columns(figure: PrimaryFigure = TOP1, batches: Sequence[str] = ("",)) -> dict[str, str]:
    """Key of a row -> head of its column: the primary figure, an amount and a share of each cost, measured times.

    Args:
        figure: The primary figure of the rows' task.
        batches: The batch sizes that are compared.
    """
    key, title = figure.key, figure.title
    figures = {
        f"dense_{key}": f"dense {title}",
        f"pruned_{key}": f"pruned {title}",
        key: title,
        f"{key}_std": "std",
        "images": "images",
        f"{key}_error": "standard error",
        "change": figure.change_title,
    }
    costs = {}
    for cost in report_costs():
        costs[cost.name] = cost.label
        costs[f"{cost.name}_share"] = f"{cost.title} kept"
    times = {}
    for batch, end in time_keys(batches).items():
        times |= {f"ms{end}": f"ms, batch {batch}", f"speedup{end}": f"speed-up, batch {batch}" if end else "speed-up"}
    return FIRST | figures | costs | times | LAST


def format_cell(key: str, value: Any, figure: PrimaryFigure = TOP1) -> str:
    """The text of a value of a row.

    Args:
        key: Its column.
        value: The value.
        figure: The primary figure of the row's task.
    """
    if value is None or value == "":
        return ""
    if key.endswith("_share"):
        return f"{value:.1%}"
    if not isinstance(value, float):
        return str(value)
    if key == "change":
        return figure.signed(value)
    if key in (figure.key, *(f"{kind}_{figure.key}" for kind in ("dense", "pruned")), f"{figure.key}_std"):
        return figure.number(value)
    return {"speedup": "{:.2f}x", "ms": "{:.3f}"}.get(key.partition("_")[0], "{:.2f}").format(value)


@dataclass(frozen=True)
class Comparison:
    """The runs of some folders.

    Attributes:
        rows: a mapping per recipe with the means over its finished seeds; keys as in ``columns`` and ``EXTRAS``.
            ``each`` has such a mapping for every seed.
        papers: points of the papers whose recipes were run (see ``paper_points``), each with its ``recipe``.
        unfinished: ``run`` and ``why`` of each run without a usable report.
        batches: the batch sizes whose latency is compared: one, or all that there are if no one is common to all runs.
        figures: ``task`` of a row -> the figure that the task is judged by. Figures of two tasks share no axis.
    """

    rows: list[dict[str, Any]]
    papers: list[dict[str, Any]]
    unfinished: list[dict[str, str]]
    batches: tuple[str, ...]
    figures: dict[str, PrimaryFigure]

    @property
    def one_task(self) -> bool:
        """Whether all runs are classifications, whose tables need not say so."""
        return set(self.figures.values()) <= {TOP1}

    def of(self, task: str) -> "Comparison":
        """The part of the rows whose ``task`` it is; with it papers' points where the figure is theirs, top-1."""
        figure = self.figures[task]
        papers = self.papers if figure == TOP1 else []
        return Comparison([r for r in self.rows if r["task"] == task], papers, [], self.batches, {task: figure})

    @property
    def note(self) -> str:
        """A sentence if the times of all runs cannot be compared at one batch size; else an empty text."""
        untimed = [row["run"] for row in self.rows if row["untimed"]]
        if len(self.batches) == 1:
            return f"Not timed at batch {self.batches[0]}: {abbreviate(untimed)}." if untimed else ""
        counts = [
            f"{batch} in {sum(row[f'ms{end}'] is not None for row in self.rows)}"
            for batch, end in time_keys(self.batches).items()
        ]
        return (
            f"No batch size is common to the times of all {len(self.rows)} recipes (report.latency_batches): "
            f"{', '.join(counts)}. Compare times of one batch size only."
        )


def collect(paths: Sequence[Path], batch: str | None = None) -> Comparison:
    """Read the runs' reports and average over the seeds of each recipe.

    Args:
        paths: run directories, or folders that hold some.
        batch: the batch size whose latency is compared; None: the largest that all runs have, or all that there are.

    Raises:
        PruneError: if there is no run, or none was timed at that batch size.
    """
    run_dirs = sorted({run_dir for path in paths for run_dir in _run_dirs(path)})
    if not run_dirs:
        raise PruneError(f"no run directory (a folder with a recipe.yaml) in {', '.join(map(str, paths))}")
    reports, unfinished = [], []
    for run_dir in run_dirs:
        why = _why_superseded(run_dir)
        if not why and not (run_dir / "report.json").exists():
            why = _why_unfinished(run_dir)
        if not why:
            try:
                reports.append(_read_report(run_dir))
            except PruneError as error:
                why = str(error)
        if why:
            unfinished.append({"run": run_dir.name, "why": why})
    batches = _batches(reports, batch)
    groups: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        keys = {key: value for key, value in report["recipe"].items() if key not in ("seed", "name", "cluster")}
        keys = rename_old_keys(flatten(keys))  # a run of an older version is a seed of the same recipe
        groups.setdefault(canonical(keys), []).append(report)
    names_of_tasks = _task_names(reports)

    def row_of(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**_row(group, batches), "task": names_of_tasks[primary_of(group[0])]}

    rows = [row_of(group) for group in groups.values()]
    recipes = [flatten(group[0]["recipe"]) for group in groups.values()]
    targets = [target_text(group[0]) for group in groups.values()]
    folders = [group[0]["folder"] for group in groups.values()]
    for row, group, name, target in zip(
        rows, groups.values(), short_names(recipes, targets, folders), targets, strict=True
    ):
        seeds = [str(report["recipe"].get("seed", "")) for report in group]
        each = [{**row_of([report]), "run": report["folder"]} for report in group]
        row |= {"name": name, "target": target, "seed_list": " ".join(seeds), "each": each}
    if len({place for row in rows for place in row["places"]}) > 1:  # each row names the machine of its times
        for row in rows:
            row["timed"] = "; ".join(filter(None, [row["timed"], *row["places"]]))
    names = [row["run"] for row in rows]
    for row, group in zip(rows, groups.values(), strict=True):
        if names.count(row["run"]) > 1:  # one recipe with other keys: the run directories distinguish the rows
            row["run"] += f" ({group[0]['folder']})"
    figures = {name: figure for figure, name in names_of_tasks.items()}
    rows.sort(key=lambda row: row["run"])
    return Comparison(rows, _papers(reports), unfinished, batches, figures)


def primary_of(report: Mapping[str, Any]) -> PrimaryFigure:
    """The figure that a report's task is judged by."""
    return PrimaryFigure.of(task_of(report))


def _task_names(reports: Sequence[Mapping[str, Any]]) -> dict[PrimaryFigure, str]:
    """Primary figure -> name of its task; with its title where versions of a task are judged by different figures."""
    figures = sorted({primary_of(report) for report in reports}, key=lambda figure: (figure.task, figure.title))
    tasks = [figure.task for figure in figures]
    return {f: f.task if tasks.count(f.task) == 1 else f"{f.task}, {f.axis_title}" for f in figures}


def _batches(reports: Sequence[Mapping[str, Any]], batch: str | None) -> tuple[str, ...]:
    """The batch sizes to compare: ``batch``, or the largest at which all runs were timed, or all that there are."""
    timed = [set(report["dense"]["latency"]) for report in reports]
    known = sorted(set[str]().union(*timed), key=int)
    if batch is not None and reports and batch not in known:
        raise PruneError(
            f"--batch: no run was timed at batch {shown(batch)}; there are times at {', '.join(known)} "
            "(the recipes' report.latency_batches)"
        )
    common = set.intersection(*timed) if timed else {"1"}
    if batch is not None or common:
        return (batch if batch is not None else max(common, key=int),)
    return tuple(known)


def _read_report(run_dir: Path) -> dict[str, Any]:
    """A finished run's report; PruneError if it cannot be read or lacks a value of the table's rows."""
    try:
        body = {**safe_parsing.read_json(run_dir / "report.json"), "folder": run_dir.name}
        figure = primary_of(body)
        for kind in ("dense", "pruned", "finetuned"):
            value = body[kind][figure.key]
            if value is None or not math.isfinite(value):
                raise PruneError(f"{figure.name} of the {kind} network is not a number")
        rows = [_row([body], [str(int(batch))]) for batch in body["dense"]["latency"]]
        _ = (
            canonical(flatten(body["recipe"])),
            target_text(body),
            [format_cell(key, row[key], figure) for row in rows for key in columns(figure)],
        )
        if not rows:
            raise PruneError("it has no latency")
    except Exception as error:  # values of other types make a row fail in many ways
        cause = str(error) if isinstance(error, PruneError) else f"{type(error).__name__}: {shown(error)}"
        raise PruneError(f"report.json is unreadable ({cause}); run the recipe again to write it anew") from error
    return body


def _run_dirs(path: Path) -> list[Path]:
    """The path itself if it is a run directory, else the run directories in it."""
    if (path / "recipe.yaml").is_file() or (path / "errors").is_dir():
        return [path]
    if not path.is_dir():
        raise PruneError(f"there is no folder {path}")
    return sorted({file.parent for pattern in ("*/recipe.yaml", "*/errors") for file in path.glob(pattern)})


def _why_superseded(run_dir: Path) -> str:
    """Why an existing report is not of the last start: it failed, or is under way; else an empty text."""
    if not (run_dir / "report.json").is_file():
        return ""
    why = _why_unfinished(run_dir)
    # every start clears the errors, and the report is the last stage
    failed = any(run_dir.glob("errors/rank_*.json"))
    under_way = why.startswith("not finished") and not why.endswith(" report")
    return f"{why} (its report is of an earlier start)" if failed or under_way else ""


def _why_unfinished(run_dir: Path) -> str:
    """Why a run has no report: the errors of its ranks, or the last finished stage."""
    errors = []
    for file in sorted(run_dir.glob("errors/rank_*.json")):
        try:
            note = safe_parsing.read_json(file)
            errors.append(f"rank {note['rank']}: {note['error']}")
        except (PruneError, KeyError, TypeError):
            errors.append(f"{file} is damaged")
    if errors:
        return "; ".join(dict.fromkeys(errors))
    try:
        last = json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])["stage"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return "no stage finished"
    return f"not finished; the last finished stage is {last}"


def _row(group: Sequence[Mapping[str, Any]], batches: Sequence[str]) -> dict[str, Any]:
    """A row of the table: means over the seeds of one recipe, and the figure's sample standard deviation."""

    def mean(value: Any) -> float:
        return statistics.fmean(value(report) for report in group)

    first = group[0]
    key = primary_of(first).key
    values = [report["finetuned"][key] for report in group]
    sizes: dict[str, float | None] = {}
    for cost in report_costs():
        known = all(cost.name in report["dense"] for report in group)  # a report may be older than a cost
        left = mean(lambda r, key=cost.name: r["finetuned"][key]) if known else None
        share = None if left is None else left / mean(lambda r, key=cost.name: r["dense"][key])
        sizes |= {cost.name: None if left is None else left / cost.divisor, f"{cost.name}_share": share}
    dense = mean(lambda r: r["dense"][key])
    images = [report["finetuned"].get("images") for report in group]
    errors = [standard_error(report, "finetuned", key) for report in group]
    return {
        "run": re.sub(r"-seed_\d+", "", first["name"]),
        "seeds": len(group),
        "backbone": first["recipe"]["backbone"]["name"],
        "method": first["recipe"]["method"]["name"],
        f"dense_{key}": dense,
        f"pruned_{key}": mean(lambda r: r["pruned"][key]),
        key: statistics.fmean(values),
        f"{key}_std": statistics.stdev(values) if len(values) > 1 else None,
        "images": images[0] if len(set(images)) == 1 else None,
        f"{key}_error": None if None in errors else statistics.fmean(error for error in errors if error is not None),
        "change": statistics.fmean(values) - dense,
        **sizes,
        **_times(group, batches),
        "places": sorted({_timing_device(r) for r in group}),
        "marked": "; ".join(selected_on_test(first["recipe"])),
    }


def _times(group: Sequence[Mapping[str, Any]], batches: Sequence[str]) -> dict[str, Any]:
    """The times of a row at each batch size, None where one of its seeds was not timed, and what is in doubt."""
    times: dict[str, Any] = {}
    doubts = []
    for batch, end in time_keys(batches).items():
        found = {
            kind: [report[kind]["latency"].get(batch) for report in group] for kind in ("dense", "finetuned")
        }  # fmt: skip
        known = [figures for several in found.values() for figures in several if figures is not None]
        complete = len(known) == 2 * len(group)
        timed = complete and all(map(is_reliable, known))
        ms = {kind: statistics.fmean(f["ms"] for f in several) for kind, several in found.items() if complete}
        times |= {
            f"ms{end}": ms.get("finetuned"),
            f"dense_ms{end}": ms.get("dense"),
            f"speedup{end}": ms["dense"] / ms["finetuned"] if timed else None,
            f"reliable{end}": timed,
        }
        if complete and not timed:
            doubts.append(f"batch {batch}: {DOUBTFUL}" if end else DOUBTFUL)
    untimed = all(times[f"ms{end}"] is None for end in time_keys(batches).values())
    return {**times, "timed": "; ".join(doubts), "untimed": untimed}


def _timing_device(report: Mapping[str, Any]) -> str:
    """The device of a run's times: they cannot be compared with those of another device or thread count."""
    latency, environment = next(reversed(report["finetuned"]["latency"].values())), report.get("environment") or {}
    on_cpu = str(latency.get("device", "cpu")).startswith("cpu")
    device = environment.get("processor" if on_cpu else "gpu") or latency.get("device", "cpu")
    return f"{device}, {latency.get('threads')} thread(s)" if on_cpu else str(device)


def _papers(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the tables in the headers of the recipes that the runs come from."""
    points = []
    for stem in sorted({report["name"].split("-")[0] for report in reports}):
        try:
            file = loading.find(stem)
        except PruneError:
            continue  # the recipe is not here any more, or was never in recipes/
        points += [{"recipe": stem, **point} for point in paper_points(file.read_text())]
    return points


def paper_points(header: str) -> list[dict[str, Any]]:
    """Read the table ``QUANTITY  top-1 drop  FLOPs  parameters`` of a recipe's header.

    Args:
        header: the text of the recipe's file.

    Returns:
        A mapping per row: ``point`` ("QUANTITY VALUE", for example "threshold 0.7"), ``change`` of top-1 in points,
        ``macs_share`` and ``params_share`` that are kept (None if the paper does not give them).
    """
    points, quantity = [], ""
    for line in header.splitlines():
        head, row = PAPER_HEAD.match(line), PAPER_ROW.match(line) if quantity else None
        quantity = head[1] if head else quantity if row else ""
        if row:
            macs, params = (None if change is None else 1 + float(change) / 100 for change in row.groups()[2:])
            points.append(
                {"point": f"{quantity} {row[1]}", "change": -float(row[2]), "macs_share": macs, "params_share": params}
            )
    return points
