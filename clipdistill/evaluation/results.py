"""A folder of results that an interrupted evaluation goes on with.

ROOT/summary.json, summary.md            all results in the folder
ROOT/MODEL/SET.TASK.json                 CLIP_benchmark's record
ROOT/MODEL/eval_results.jsonl            DataComp's lines, one a set
ROOT/MODEL/details/SET.TASK.json         the record, per-class results, unreadable images, settings, and the key

The details are written first and in one step, and everything else comes from them: a result is there or it is not.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from clipdistill.evaluation.benchmark_format import Record, main_metric
from clipdistill.evaluation.datacomp import datacomp_line
from clipdistill.evaluation.robustness import TASK as ROBUSTNESS
from clipdistill.io.files import write_json, write_text, writing

FORMAT = 1
"""Of the details; another one when results of the same key may differ."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a result belongs: names that a file can have."""

    model: str
    data: str
    task: str


class Results:
    """The results of any number of models and sets; one process at a time writes into the folder.

    What cannot be written is a RunError, one line with the reason.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, place: Place, key: str) -> Record | None:
        """The record of a result that is there under this key: same weights, samples, prompts and settings."""
        details = _read(self._details(place))
        return details["record"] if details.get("key") == key else None

    def save(self, place: Place, key: str, record: Record, details: dict[str, Any]) -> None:
        """Keep a result, in place of another one of its name."""
        path = self._details(place)
        with writing(f"result {path}", self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, "key": key, "record": record, **details})

    def write_all(self) -> None:
        """Write what comes from the details, where there are any: records, DataComp's lines, the summary."""
        models = sorted({path.parent.parent for path in self.root.glob("*/details/*.json")})
        if models:
            with writing(f"the summary of {self.root}", self.root):
                self._write(models)

    def _write(self, models: Sequence[Path]) -> None:
        everything: list[Record] = []
        for model in models:
            found = {path.name: _read(path).get("record") for path in sorted((model / "details").glob("*.json"))}
            records = {name: record for name, record in found.items() if record is not None}
            for name, record in records.items():
                write_json(model / name, record)
            zero_shot = [record for record in records.values() if record["task"].startswith("zeroshot_")]
            lines = [json.dumps(datacomp_line(record), allow_nan=False) for record in zero_shot]
            write_text(model / "eval_results.jsonl", "".join(f"{line}\n" for line in lines))
            everything += records.values()
        write_json(self.root / "summary.json", {"results": everything})
        write_text(self.root / "summary.md", as_markdown(table_of(everything)))

    def _details(self, place: Place) -> Path:
        return self.root / place.model / "details" / f"{place.data}.{place.task}.json"


def slug(text: str) -> str:
    """A name that a file can have, of a path, URL or model name."""
    return re.sub(r"[^A-Za-z0-9.@-]+", "_", text).strip("_.") or "_"


def load_results(paths: list[Path]) -> list[Record]:
    """The records in files and in folders, such as this module writes them; other JSON files are passed over."""
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    found = [_read(file) for file in files if file.parent.name != "details"]
    return [record for record in found if {"dataset", "task", "metrics"} <= record.keys()]


def table_of(records: list[Record]) -> list[list[str]]:
    """Rows of text: a heading, a row for each set and metric, and the mean; a column for each model.

    With a teacher, the share of its main metric that is kept stands behind the model's own. Sets of one name are
    numbered.
    """
    models = list(dict.fromkeys(_model(record) for record in records))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    zero_shot: dict[str, list[float]] = {}
    for record in records:
        for label, metric, value in _rows(record):
            keys = ((f"{label}{'' if number == 1 else f' ({number})'}", metric) for number in count(1))
            free = next(key for key in keys if _model(record) not in cells.get(key, {}))
            cells.setdefault(free, {})[_model(record)] = value
        if record["task"].startswith("zeroshot_"):
            zero_shot.setdefault(_model(record), []).append(main_metric(record)[1])
    rows = [["set", "metric", *models]]
    rows += [[*key, *(row.get(model, "") for model in models)] for key, row in cells.items()]
    if max((len(values) for values in zero_shot.values()), default=0) > 1:
        rows.append(["mean", "zero-shot", *(_mean(zero_shot.get(model, ())) for model in models)])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    ruler = ["---", "---", *["---:" for _ in heading[2:]]]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ruler, *body))


def _rows(record: Record) -> list[tuple[str, str, str]]:
    """Label, metric and value of what the table shows of a result."""
    metrics, data = record["metrics"], record["dataset"]
    if record["task"] != ROBUSTNESS:
        name, value = main_metric(record)
        share = metrics.get("share_of_teacher")
        return [(data, name, f"{value:.2%}" + (f" ({share:.0%} of teacher)" if share is not None else ""))]
    shifts = [name.removesuffix("/drop") for name in metrics if name.endswith("/drop")]
    rows = [(data, "acc1", f"{metrics['base_acc1']:.2%}")]
    for shift in shifts:
        accuracy, drop = metrics[f"{shift}/acc1"], metrics[f"{shift}/drop"]
        rows.append((f"{data} > {shift}", "acc1 (drop)", f"{accuracy:.2%} ({drop:.2%})"))
        if (effective := metrics.get(f"{shift}/effective_robustness")) is not None:
            rows.append((f"{data} > {shift}", "effective robustness", f"{effective:+.2%}"))
    return rows


def _model(record: Record) -> str:
    return f"{record['model']} {record['pretrained']}".strip()


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2%} of {len(values)}" if values else ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
