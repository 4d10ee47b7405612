"""The tokenizer's files: ``tokenizer.json`` gives the model's own ids in any reader of Hugging Face tokenizers.

Where its ids differ, because open_clip cleans texts differently, it is left out, unless open_clip itself loads it.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from clipdistill.models.towers import Tower

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""Special tokens: open_clip's name -> the name in transformers' CLIP tokenizer."""


def write_tokenizer(tower: Tower, folder: Path, texts: Sequence[str]) -> str | None:
    """Write the tokenizer into a folder, with padding and truncation to the context length.

    Args:
        tower: owner of the tokenizer.
        folder: receives ``tokenizer.json`` and ``tokenizer_config.json``; if they do not give the tower's ids, only if
            open_clip itself loads the tokenizer from them.
        texts: on which the ids are compared.

    Returns:
        None if the files give the tower's ids; else the reason why only open_clip can tokenize for this model.
    """
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        reason = _write(tower.tokenizer, Path(aside), texts)
        if reason is None or isinstance(tower.tokenizer, HFTokenizer):
            for file in Path(aside).iterdir():
                file.replace(folder / file.name)
    return reason


def _write(tokenizer: Any, folder: Path, texts: Sequence[str]) -> str | None:
    context: int = tokenizer.context_length
    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.reduction_fn is not None:
            return "tokenizer: drops tokens at random (reduction_mask)"
        vocabulary = {_SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}
        merges = list(tokenizer.bpe_ranks)
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context).save_pretrained(str(folder))
        padding, pad_id = "!", 0
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        padding, pad_id = tokenizer.tokenizer.pad_token, tokenizer.tokenizer.pad_token_id
    else:
        return f"tokenizer: a {type(tokenizer).__name__}, which has no files"
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return f"tokenizer: a {type(tokenizer).__name__} without {TOKENIZER_FILE}"
    written = Tokenizer.from_file(str(path))
    written.enable_truncation(max_length=context)
    written.enable_padding(length=context, pad_id=pad_id, pad_token=padding)
    ids = [encoding.ids for encoding in written.encode_batch(list(texts))]
    expected = tokenizer(list(texts)).tolist()
    differing = next((text for text, own, clip in zip(texts, ids, expected, strict=True) if own != clip), None)
    if differing is not None:
        return f"tokenizer: other ids than open_clip's for {differing[:40]!r}"
    written.save(str(path))
    _set_context_length(folder / TOKENIZER_CONFIG_FILE, context)
    return None


def _set_context_length(path: Path, context: int) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = context
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
