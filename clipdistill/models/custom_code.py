"""Models and tokenizers are data: nothing that a folder or repository names as Python code is run.

open_clip passes ``text_cfg.tokenizer_kwargs`` of a model config to transformers, ``trust_remote_code`` among them. If a
folder's config has an ``auto_map``, transformers then runs the folder's code, or asks on the terminal whether to.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from transformers import dynamic_module_utils

from clipdistill.errors import InputError

_TOKENIZER_SETTINGS = ("clean", "language", "reduction_mask", "strip_sep_token")
"""Settings of open_clip's own in ``text_cfg.tokenizer_kwargs``; all others go to transformers, or name a file."""


def refuse_code(model: str, config: Mapping[str, Any]) -> None:
    """Check a model config before the model is built.

    Args:
        model: name of the model, for the message.
        config: open_clip's model config.

    Raises:
        InputError: settings of the tokenizer, a tokenizer or a text tower that could run code.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # raise an error in place of the question on the terminal
    text = config.get("text_cfg", {})
    for name, value in text.get("tokenizer_kwargs", {}).items():
        if name not in _TOKENIZER_SETTINGS:
            allowed = ", ".join(_TOKENIZER_SETTINGS)
            raise InputError(f"model {model}: text_cfg.tokenizer_kwargs.{name}: {value!r}; allowed: {allowed}")
    local = model.startswith("local-dir:")  # its tokenizer is then in the folder itself, whatever the config names
    tokenizer = model.partition(":")[2] if local else text.get("hf_tokenizer_name")
    for folder in (tokenizer, text.get("hf_model_name")):
        if folder:
            _refuse_auto_map(Path(folder))


def load_tokenizer(name: str, config: Mapping[str, Any]) -> Any:
    """open_clip's tokenizer of a model whose config ``refuse_code`` has checked.

    Raises:
        InputError: the tokenizer has code of its own.
    """
    if not config.get("text_cfg", {}).get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(name)
    return _without_code(name, open_clip.get_tokenizer(name, trust_remote_code=False))


def load_folder_tokenizer(folder: Path, *, context_length: int) -> HFTokenizer:
    """The tokenizer in a folder that transformers wrote.

    Raises:
        InputError: the tokenizer has code of its own.
    """
    _refuse_auto_map(folder)
    tokenizer = HFTokenizer(str(folder), context_length=context_length, trust_remote_code=False)
    return _without_code(str(folder), tokenizer)


def _refuse_auto_map(folder: Path) -> None:
    for path in (folder / "tokenizer_config.json", folder / "config.json"):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "auto_map" in content:
                raise InputError(_message(str(path), content["auto_map"]))


def _without_code(source: str, tokenizer: HFTokenizer) -> HFTokenizer:
    """The tokenizer, unless its repository names code; transformers has then used a class of its own instead."""
    settings = tokenizer.tokenizer.init_kwargs
    if "auto_map" in settings:
        raise InputError(_message(f"model {source}", settings["auto_map"]))
    return tokenizer


def _message(source: str, auto_map: Any) -> str:
    return f"{source}: auto_map: {auto_map!r}; allowed: a model without Python code of its own"
