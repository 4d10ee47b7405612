"""``clipdistill report``: one HTML file of a run; its numbers are those of metrics.jsonl and of ``evaluate``."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clipdistill.cli import main
from clipdistill.config import load_config
from clipdistill.io.jsonl import read_jsonl
from clipdistill.training.trainer import train
from tests.conftest import CLASSES, colour_samples, write_tar
from tests.servers import Ranges, files, serving


class Page(HTMLParser):
    """What a browser would be told to load, the text, and the sources of pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.pictures.append(values["src"] or "")
        elif values.get("src") or tag == "link":
            self.loaded.append(values.get("src") or values.get("href") or "")
        if tag in ("script", "style"):
            self._tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._tags and self._tags[-1] == tag:
            self._tags.pop()

    def handle_data(self, data: str) -> None:
        (self.scripts if self._tags else self.text).append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `trained` puts its run; one for all tests."""
    return tmp_path_factory.mktemp("report") / "run"


@pytest.fixture
def trained(run: Path, colours: Path, write_config: Callable[..., Path]) -> Path:
    if not run.exists():
        train(load_config(write_config(), [f"output={run}", "train.log_every=1"]))
    return run


def plots(page: Page) -> list[dict[str, object]]:
    """The arguments of every call of Plotly.newPlot: traces."""
    found = []
    for script in page.scripts:
        for match in re.finditer(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*", script):
            found += json.JSONDecoder().raw_decode(script, match.end())[0]
    return found


def test_a_finished_run(trained: Path, colours: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert main(["report", str(trained), "--output", str(file), "--examples", "8"]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert page.loaded == []
    text = " ".join(page.text)
    data, result = str(colours / "set"), tmp_path / "result.json"
    assert main(["evaluate", "--model", str(trained), "--data", data, "--output", str(result)]) == 0
    accuracy = json.loads(result.read_text())["metrics"]["acc1"]
    assert f"{accuracy:.4f}" in text
    assert f"21 samples, {len(CLASSES)} classes" in text
    assert 4 <= len(page.pictures) <= 8
    assert all(picture.startswith("data:image/png;base64,") for picture in page.pictures)
    losses = [record["loss"] for record in read_jsonl(trained / "metrics.jsonl") if "loss" in record]
    (total,) = [trace for trace in plots(page) if trace.get("name") == "weighted total"]
    assert total["y"] == pytest.approx(losses)


def test_results_under_attack_and_from_frequent_to_rare_classes(
    trained: Path, colours: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results of the very student are shown; another model's are refused."""
    tailed = tmp_path / "set"
    shutil.copytree(colours / "set", tailed)
    (tailed / "train").mkdir()
    counts = {"red": 120, "green": 30, "blue": 30, "grey": 1}
    (tailed / "train" / "class_counts.json").write_text(json.dumps(counts))
    for name, model in {"student": trained, "other": teacher_folder}.items():
        attack = ["--attack", "pgd", "--eps", "1/255", "16/255", "--output", str(tmp_path / name)]
        assert main(["evaluate", "--model", str(model), "--data", str(tailed), *attack]) == 0
    file = tmp_path / "report.html"
    command = ["report", str(trained), "--output", str(file), "--data", str(tailed), "--examples", "0", "--results"]
    assert main([*command, str(tmp_path / "student")]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    (details,) = (tmp_path / "student").glob("*/details/*.json")
    metrics = json.loads(details.read_text())["record"]["metrics"]
    text = " ".join(" ".join(page.text).split())
    assert f"set under attack: PGD, 21 images radius student 0 {metrics['acc1']:.2%}" in text
    assert f"16/255 {metrics['robust_acc1@16/255']:.2%}" in text
    assert "few_shot_acc1" in text
    curve = next(
        trace for trace in plots(page) if trace.get("name") == "student" and "x" in trace and len(trace["x"]) == 4
    )
    assert curve["x"] == [0.5, 1.5, 2.5, 3.5]
    plain = ["evaluate", "--model", str(trained), "--data", str(tailed), "--output", str(tmp_path / "plain")]
    assert main(plain) == 0
    capsys.readouterr()
    assert main([*command, str(tmp_path / "plain")]) == 2
    assert "plain: no result of `clipdistill evaluate --attack`" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "other")]) == 2
    assert re.search(
        r"--results .*other: holds 1 results, none of this model's weights in fp32", capsys.readouterr().err
    )


def test_a_run_that_has_not_ended_has_curves_only(trained: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (unfinished / name).write_bytes((trained / name).read_bytes())
    assert main(["report", str(unfinished)]) == 0
    page = Page((unfinished / "report.html").read_text(encoding="utf-8"))
    assert "holds no student yet" in " ".join(page.text)
    assert page.pictures == []
    assert any(trace.get("name") == "weighted total" for trace in plots(page))


def test_an_unreadable_image_is_counted_and_not_shown(trained: Path, colours: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken"
    samples = colour_samples(6, first=500)
    samples[2]["png"] = b"no picture"
    write_tar(data / "test" / "0.tar", samples)
    (data / "test" / "nshards.txt").write_text("1")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (data / name).write_text((colours / "set" / name).read_text())
    file = tmp_path / "report.html"
    assert main(["report", str(trained), "--data", str(data), "--output", str(file), "--no-teacher"]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert len(page.pictures) == 5
    assert "unreadable" in " ".join(page.text)


def test_names_from_data_cannot_act_as_html(trained: Path, colours: Path, tmp_path: Path) -> None:
    data = tmp_path / "set"
    write_tar(data / "test" / "0.tar", colour_samples(6, first=500))
    (data / "test" / "nshards.txt").write_text("1")
    (data / "classnames.txt").write_text("\n".join(f"<script>alert({n})</script>" for n in range(len(CLASSES))))
    (data / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    file = tmp_path / "report.html"
    assert main(["report", str(trained), "--data", str(data), "--output", str(file)]) == 0
    assert "<script>alert(" not in file.read_text(encoding="utf-8")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: run {tmp_path}: no config.yaml")


def test_bad_arguments_are_refused_before_anything_is_loaded(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main(["report", str(trained), *map(str, arguments)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        return line

    assert "--device abacus: not available here" in refused("--device", "abacus")
    assert f"--output {tmp_path}: a folder; allowed: a file" in refused("--output", tmp_path)
    assert "--output /dev/null: a special file; allowed: a file" in refused("--output", "/dev/null")
    with pytest.raises(SystemExit):
        main(["report", str(trained), "--examples", "-5"])
    assert "--examples: -5 is not allowed; allowed: a whole number, 0 or more" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "report.html"
    assert main(["report", str(trained), "--no-teacher", "--examples", "0", "--output", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: report {file} could not be written: No space left on device (")
    assert list(tmp_path.iterdir()) == []


def test_a_remote_set_of_the_config_is_fetched_on_demand(
    trained: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may come from anywhere: its config alone makes nobody connect to a server."""
    requests: list[str] = []

    class Noting(Ranges):
        def log_request(self, *_: object) -> None:
            requests.append(self.path)

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with serving(files(colours / "set", Noting)) as url:
        config = OmegaConf.load(run / "config.yaml")
        config.evaluation.folders = [url]
        config.data.cache = str(tmp_path / "cache")
        config.teachers[0].model = "hf-hub:nobody/nothing"
        OmegaConf.save(config, run / "config.yaml")
        assert main(["report", str(run)]) == 0
        told = capsys.readouterr().out
        assert f"left out test set {url}" in told
        assert "left out teacher hf-hub:nobody/nothing" in told
        assert requests == []
        assert f"Left out: test set {url}" in (run / "report.html").read_text(encoding="utf-8")

        assert main(["report", str(run), "--remote", "--no-teacher", "--examples", "4"]) == 0
    assert len(list((tmp_path / "cache" / "copies").glob("*.tar"))) == 2
    assert len(Page((run / "report.html").read_text(encoding="utf-8")).pictures) == 4
