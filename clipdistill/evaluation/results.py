"""A folder of evaluation results, from which an interrupted evaluation continues.

ROOT/summary.json, summary.md            all results in the folder
ROOT/MODEL/SET.TASK.json                 CLIP_benchmark's record
ROOT/MODEL/eval_results.jsonl            DataComp's lines, one per set
ROOT/MODEL/details/SET.TASK.json         the record, per-class results, unreadable images, settings, the key, and the
                                         fingerprint of the model

The details are written first, atomically; all other files are derived from them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import Record, main_metric
from clipdistill.evaluation.datacomp import datacomp_line
from clipdistill.evaluation.robustness import TASK as ROBUSTNESS
from clipdistill.io.files import write_json, write_text, writing

_NAME_CHARACTERS = 150

FORMAT = 3
"""Version of the details; increased when results under the same key may differ."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResultName:
    """What a result's files are named after: model, set and task, as file names."""

    model: str
    data: str
    task: str


class ResultsFolder:
    """The results of any number of models and sets; one process at a time may write into the folder.

    Methods that write raise RunError, one line with the reason, where they cannot.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: ResultName, key: str) -> Record | None:
        """The stored record with this key: same weights, samples, prompts and settings; None where there is none."""
        details = _read_details(self._details(name))
        return details["record"] if details and details["key"] == key else None

    def save(self, name: ResultName, key: str, record: Record, details: dict[str, Any]) -> None:
        """Save a result, replacing one of the same name."""
        path = self._details(name)
        with writing(f"result {path}", self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            saved = json.loads(json.dumps({"format": FORMAT, "key": key, "record": record, **details}))
            write_json(path, saved | {"sha256": _digest(saved)})

    def write_all(self) -> None:
        """Write the files derived from the details, if there are any: records, DataComp's lines, the summary."""
        models = sorted({path.parent.parent for path in self.root.glob("*/details/*.json")})
        if models:
            with writing(f"the summary of {self.root}", self.root):
                self._write(models)

    def _write(self, models: Sequence[Path]) -> None:
        everything: list[Record] = []
        for model in models:
            found = {path.name: _read_details(path) for path in sorted((model / "details").glob("*.json"))}
            records = {name: details["record"] for name, details in found.items() if details is not None}
            for name, record in records.items():
                write_json(model / name, record)
            zero_shot = [record for record in records.values() if record["task"].startswith("zeroshot_")]
            lines = [json.dumps(datacomp_line(record), allow_nan=False) for record in zero_shot]
            write_text(model / "eval_results.jsonl", "".join(f"{line}\n" for line in lines))
            everything += records.values()
        write_json(self.root / "summary.json", {"results": everything})
        write_text(self.root / "summary.md", as_markdown(table_of(everything)))

    def _details(self, name: ResultName) -> Path:
        return self.root / name.model / "details" / f"{name.data}.{name.task}.json"


def slug(text: str) -> str:
    """A file name for a path, URL or model name: the text itself if it can be one, else what is left of it and a
    digest; different texts have different names."""
    if re.fullmatch(r"[A-Za-z0-9@-][A-Za-z0-9.@_-]*", text) and len(text) <= _NAME_CHARACTERS:
        return text
    plain = re.sub(r"[^A-Za-z0-9.@-]+", "_", text)[-_NAME_CHARACTERS:].strip("_.")
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain}-{digest}" if plain else digest


def results_of(folders: Sequence[Path], fingerprint: str, *, flag: str) -> list[dict[str, Any]]:
    """The details of all results of one model in folders of ``clipdistill evaluate --output``.

    Args:
        folders: of results, of any models.
        fingerprint: of the model (`clipdistill.evaluation.models.fingerprint`), at the precision of the results.
        flag: what names the folders, in messages.

    Raises:
        InputError: no such folder, or one without a result of the model.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{flag} {folder}: no such folder; allowed: one that `clipdistill evaluate --output` wrote"
            )
        every = [_read_details(path) for path in sorted(folder.rglob("details/*.json"))]
        own = [details for details in every if details is not None and details.get("model") == fingerprint]
        if not own:
            raise InputError(
                f"{flag} {folder}: holds {len(every)} results, none of this model's weights in fp32; allowed: what "
                "`clipdistill evaluate --precision fp32 --output` wrote of it"
            )
        found += own
    return found


def load_results(paths: list[Path]) -> list[Record]:
    """Records in files and folders written by this module; other JSON files are skipped."""
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    found = [_read(file) for file in files if file.parent.name != "details"]
    return [record for record in found if {"dataset", "task", "metrics"} <= record.keys()]


def table_of(records: list[Record]) -> list[list[str]]:
    """Rows of text: a heading, a row for each set and metric, and the mean; a column for each model.

    With a teacher, the share of its main metric follows the model's own. Sets of the same name are numbered.
    """
    models = list(dict.fromkeys(_model(record) for record in records))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    zero_shot: dict[str, list[float]] = {}
    for record in records:
        for label, metric, value in _rows(record):
            keys = ((f"{label}{'' if number == 1 else f' ({number})'}", metric) for number in count(1))
            unused = next(key for key in keys if _model(record) not in cells.get(key, {}))
            cells.setdefault(unused, {})[_model(record)] = value
        if record["task"].startswith("zeroshot_"):
            zero_shot.setdefault(_model(record), []).append(main_metric(record)[1])
    rows = [["set", "metric", *models]]
    rows += [[*key, *(row.get(model, "") for model in models)] for key, row in cells.items()]
    if max((len(values) for values in zero_shot.values()), default=0) > 1:
        rows.append(["mean", "zero-shot", *(_mean(zero_shot.get(model, ())) for model in models)])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    """A table in Markdown, numbers right-aligned."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    ruler = ["---", "---", *["---:" for _ in heading[2:]]]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ruler, *body))


def _rows(record: Record) -> list[tuple[str, str, str]]:
    """The table's rows for a result: label, metric, value."""
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


def _read_details(path: Path) -> dict[str, Any] | None:
    """A result's details; None if they are missing, or not what was saved."""
    details = _read(path)
    stored = details.pop("sha256", None)
    if stored == _digest(details):
        return details
    if path.is_file():
        log.warning("result %s is not what was saved, and does not count", path)
    return None


def _digest(details: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(details, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
