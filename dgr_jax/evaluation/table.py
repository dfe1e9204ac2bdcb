"""One table of several evaluations: ours, of one or several seeds, and those of lm_eval."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.errors import UserError, in_range, shown
from dgr_jax.run.files import read_json, unreadable

_Z = 1.96


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rate.

    Attributes:
      value: the rate; of several seeds their mean.
      low, high: its 95 % interval; None of several seeds, and where nobody says.
      n: items, or None.
      seeds: runs behind it.
      least, most: the lowest and the highest rate of several seeds.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None
    seeds: int = 1
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        low, high = (self.low, self.high) if self.seeds == 1 else (self.least, self.most)
        span = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        return f"{self.value:.3f}{span}"


type Column = dict[tuple[str, str], Cell]
"""(suite, metric) -> rate."""


def read_column(places: str) -> Column:
    """The rates of one model.

    Args:
      places: a folder of evaluate.py or regrade.py, a folder or results file of lm_eval, or several of one kind, of
        several seeds, with commas between.

    Raises:
      UserError: neither is there.
    """
    folders = [place for place in places.split(",") if place]
    if repeated := [place for place in folders if folders.count(place) > 1]:
        raise UserError(f"{places}: {repeated[0]} is there twice; give each run once")
    found = [_of_one(place) for place in folders]
    if not found:
        raise UserError(f"{shown(places)} names no folder; give what evaluate.py or lm_eval wrote")
    if len(found) == 1:
        return found[0]
    if odd := [key for column in found[1:] for key in column.keys() ^ found[0].keys()]:
        suite, metric = min(odd)
        raise UserError(
            f"{places}: not all of them have {metric} of {suite}; join runs on the same suites, judged alike "
            "(scripts/regrade.py)"
        )
    return {key: _of_seeds([column[key] for column in found]) for key in found[0]}


def _of_seeds(cells: Sequence[Cell]) -> Cell:
    values = [cell.value for cell in cells]
    return Cell(statistics.fmean(values), None, None, cells[0].n, len(cells), min(values), max(values))


def _of_one(place: str) -> Column:
    folder = epath.Path(place)
    if folder.is_dir() and (folder / "results.json").exists():
        return _of_ours(folder / "results.json")
    files = [folder] if folder.is_file() else list(_results_files(folder))
    if not files:
        raise UserError(f"{folder}: has no results.json and no results_*.json; give what evaluate.py or lm_eval wrote")
    if len(models := sorted({str(file.parent) for file in files})) > 1:
        raise UserError(f"{folder}: holds {len(models)} models; give them one by one: {' '.join(models)}")
    column: Column = {}
    for file in files:  # of a task that was run twice, the later one
        column |= _of_lm_eval(file)
    return column


def _of_ours(file: epath.Path) -> Column:
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_ours(row) for row in rows):
        raise UserError(f"{file}: is not what evaluate.py wrote; give its folder, or lm_eval's")
    return {
        (row["suite"], _metric(row)): Cell(row["value"], row["low"], row["high"], row["n"])
        for row in rows
        if not row.get("group")
    }


def _is_ours(row: Mapping[str, Any]) -> bool:
    texts = (row.get("suite"), row.get("metric"), row.get("judge", ""))
    return all(isinstance(text, str) for text in texts) and all(
        _is_rate(row.get(k)) for k in ("value", "low", "high", "n")
    )


def _is_rate(value: Any) -> bool:
    return in_range(value, 0.0, _MOST)


_MOST = 1e12
"""Of any number in a table: a whole one may be beyond what a float holds."""


def _metric(row: Mapping[str, Any]) -> str:
    """With who judged: rates by two judges are two rates."""
    if "judge" not in row:
        return row["metric"]
    version = row.get("judge_fingerprint")
    return f"{row['metric']} ({row['judge']}{f' {version[:4]}' if isinstance(version, str) else ''})"


def _results_files(folder: epath.Path) -> Iterator[epath.Path]:
    """lm_eval's, which it puts into a folder by the model's name and calls by their time."""
    try:
        found = [*folder.glob("results_*.json"), *folder.glob("*/results_*.json")]
    except OSError as error:
        raise unreadable(folder, error) from error
    yield from sorted(found, key=lambda file: file.name)


def _of_lm_eval(file: epath.Path) -> Column:
    found = read_json(file)
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, dict) or not all(isinstance(task, dict) for task in results.values()):
        raise UserError(f"{file}: is not what lm_eval wrote; give the folder of its --output_path")
    counts = found.get("n-samples")
    column: Column = {}
    for task, values in results.items():
        count = counts.get(task) if isinstance(counts, dict) else None
        n = count.get("effective") if isinstance(count, dict) else None
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not in_range(value, -_MOST, _MOST):
                continue
            error = values.get(f"{metric}_stderr,{how}")
            half = _Z * error if in_range(error, 0.0, _MOST) else None
            name = metric if how == "none" else f"{metric}, {how}"
            span = (None, None) if half is None else (value - half, value + half)
            column[task, name] = Cell(float(value), *span, n if in_range(n, 0, _MOST) else None)
    return column


def table_text(columns: Mapping[str, Column]) -> str:
    """The table: a line for each suite and metric, a column for each model."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    letters = [chr(ord("A") + number) for number in range(len(columns))]
    cells = [["suite", "metric", *letters]]
    for key in keys:
        cells.append([*key, *(str(column[key]) if key in column else "-" for column in columns.values())])
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    for letter, (name, column) in zip(letters, columns.items(), strict=True):
        seeds = max((cell.seeds for cell in column.values()), default=1)
        lines.append(f"{letter}: {name}" + (f" (mean of {seeds} runs [least, most])" if seeds > 1 else ""))
    return "\n".join(lines)
