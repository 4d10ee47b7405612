"""``clipdistill quickstart`` as a newcomer runs it, with fewer steps."""

import json
from pathlib import Path

import pytest

from clipdistill.cli import main


@pytest.mark.slow
def test_leaves_a_student_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a teacher cache of one view; a second call trains nothing, and says the same."""
    arguments = ["quickstart", "--output", str(tmp_path / "quick"), "train.steps=150", "data.views=1"]
    assert main(arguments) == 0
    folder = tmp_path / "quick"
    results = json.loads((folder / "results.json").read_text())
    assert results["classes"] == 240
    assert results["images"] == 701
    assert results["teacher"]["acc1"] == pytest.approx(0.632, abs=0.005)
    assert 0.1 < results["student"]["acc1"] < results["teacher"]["acc1"]
    assert results["times_smaller"] == pytest.approx(29, abs=1)
    assert (folder / "icons.png").stat().st_size > 10_000
    assert list((folder / "embeddings").glob("*.safetensors"))
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    again = json.loads((folder / "results.json").read_text())
    assert again["student"]["acc1"] == results["student"]["acc1"]
    assert "of the teacher" in capsys.readouterr().out
