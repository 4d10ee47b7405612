"""Model folders that would run code: refused by every loader, the code is not run and no question is asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation
from clipdistill.io.resources import resource
from clipdistill.models.loading import load_frozen_model, load_student

AUTO_MAP = {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}


def change(path: Path, update: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    update(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The icons teacher, beside Python code that leaves a file when it is run."""
    shutil.copytree(resource("weights", "icons-teacher"), tmp_path / "model")
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n"
    (tmp_path / "model" / "evil.py").write_text(code)
    return tmp_path / "model"


def text_config(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model_cfg"]["text_cfg"].update(settings)


def assert_refused(load: Callable[[], object], folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    with pytest.raises(InputError, match=line) as refused:
        load()
    assert "\n" not in str(refused.value)
    assert not questions
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("load", [load_frozen_model, load_student, load_for_evaluation])
def test_tokenizer_that_a_config_trusts(
    load: Callable[[str], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "tokenizer_config.json", lambda content: content.update(AUTO_MAP, tokenizer_class="Evil"))
    change(folder / "open_clip_config.json", text_config(tokenizer_kwargs={"trust_remote_code": True}))
    assert_refused(lambda: load(f"local-dir:{folder}"), folder, monkeypatch, "trust_remote_code: True; allowed: clean")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("tokenizer_class", ["Evil", "TokenizersBackend"])
def test_tokenizer_with_code_of_its_own(
    file: str, tokenizer_class: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / file, lambda content: content.update(AUTO_MAP, tokenizer_class=tokenizer_class))
    assert_refused(lambda: load_frozen_model(f"local-dir:{folder}"), folder, monkeypatch, "allowed: a model without")


def test_tokenizer_file_that_a_config_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"clean": "lower", "tokenizer_file": "/etc/hostname"}
    change(folder / "open_clip_config.json", text_config(tokenizer_kwargs=settings))
    assert_refused(lambda: load_frozen_model(f"local-dir:{folder}"), folder, monkeypatch, "tokenizer_file: '/etc")


def test_text_tower_with_code_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tower").mkdir()
    shutil.move(folder / "evil.py", folder / "tower" / "evil.py")
    change(folder / "tower" / "config.json", lambda content: content.update(AUTO_MAP, model_type="evil"))
    change(folder / "open_clip_config.json", text_config(hf_model_name=str(folder / "tower")))
    assert_refused(lambda: load_frozen_model(f"local-dir:{folder}"), folder, monkeypatch, "tower/config.json: auto_map")


def test_students_config_with_such_a_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "tokenizer_config.json", lambda content: content.update(AUTO_MAP))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (tmp_path / "custom-code-student.json").write_text(json.dumps(config))
    path = str(tmp_path / "custom-code-student.json")
    assert_refused(lambda: load_student(path), folder, monkeypatch, "tokenizer_config.json: auto_map")


def test_transformers_folder_with_code_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    (folder / "open_clip_config.json").unlink()
    model.save_pretrained(folder)
    change(folder / "tokenizer_config.json", lambda content: content.update(AUTO_MAP))
    assert_refused(lambda: load_for_evaluation(str(folder)), folder, monkeypatch, "tokenizer_config.json: auto_map")
