"""Metrics files with damaged lines."""

from pathlib import Path

import pytest

from clipdistill.io.jsonl import JsonlWriter, filter_jsonl, read_jsonl


@pytest.mark.parametrize(
    "damaged", [b'{"step": 2, "lo', b"\xff\xfe\x00", b"", b"[2]", b"7", b'{"loss": 1}', b"[" * 9999]
)
def test_lines_after_a_damaged_one_survive(tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n{"step": 4}\n{"st')
    assert [record["step"] for record in read_jsonl(file)] == [1, 3, 4]
    assert "metrics.jsonl:2: not a record" in caplog.text
    filter_jsonl(file, lambda record: record["step"] < 4)
    assert file.read_bytes() == b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n'
    writer = JsonlWriter(file)
    writer.write({"step": 4})
    writer.close()
    assert [record["step"] for record in read_jsonl(file)] == [1, 3, 4]


def test_a_whole_last_line_needs_no_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}')
    filter_jsonl(file, lambda _: True)
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
