"""Class embeddings (zero-shot weights) and similarity logits.

Shapes: B images, C classes, T templates, L tokens, D features.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.io.caches import CLASS_EMBEDDINGS, mark_used
from clipdistill.io.files import new_file
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import FrozenModel, Tower

log = logging.getLogger(__name__)

_FORMAT = 1


def similarity_logits(image_BD: Tensor, text_CD: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
    """Logits (B, C): ``scale * cosine + bias`` of unit-norm features, in float32."""
    with torch.autocast(image_BD.device.type, enabled=False):
        logits_BC = scale * (image_BD.float() @ text_CD.float().T)
        return logits_BC if bias is None else logits_BC + bias


def class_embeddings(
    tower: Tower,
    prompts: PromptSet,
    *,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Tensor:
    """Class features (C, D) of a tower, unit norm: the mean over templates of unit-norm text features, as in CLIP.

    Args:
        tower: encodes the prompts, without gradient.
        prompts: classes and templates.
        cache: folder for the result, keyed by the text tower's weights, its tokenizer and the prompts, and verified
            when it is read; None: not cached.
        device: of the tower and of the result.
        batch_size: texts encoded at once.

    Raises:
        InputError: as ``class_prompt_tokens``.
    """
    if isinstance(tower, FrozenModel) and (stored_CD := tower.stored_class_embeddings(prompts)) is not None:
        return stored_CD.to(device)
    path = key = None
    tokens_NL: Tensor | None = None
    if cache is not None:
        tokenizer = tower.text_tokenizer.digest()
        if tokenizer is None:
            tokens_NL = _tokenize(tower, prompts)
            tokenizer = hashlib.sha256(tokens_NL.numpy().tobytes()).hexdigest()
        made_of = [_FORMAT, tower.text_fingerprint(), tokenizer]
        made_of += [prompts.classnames, prompts.templates, prompts.duplicates]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        path = cache / CLASS_EMBEDDINGS / f"{key}.safetensors"
        stored_CD = _load(path, key, shape=(prompts.num_classes, tower.embed_dim))
        if stored_CD is not None:
            mark_used(path)
            return stored_CD.to(device)
    if tokens_NL is None:
        tokens_NL = _tokenize(tower, prompts)
    was_training = tower.training
    tower.eval()
    with torch.no_grad():
        groups = tower.text_tokenizer.group(tokens_NL, at_most=batch_size)
        groups = groups._replace(place_N=groups.place_N.to(device))
        text_ND = groups.encode(lambda tokens: tower.encode_tokens(tokens.to(device)))
    tower.train(was_training)
    text_CTD = text_ND.view(prompts.num_classes, prompts.num_templates, -1)
    class_CD = F.normalize(text_CTD.mean(1), dim=-1)
    if path is not None and key is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored_CD = class_CD.contiguous().cpu()
            with new_file(path) as temporary:
                save_file({"embeddings": stored_CD}, temporary, metadata={"key": key, "digest": _digest(stored_CD)})
        except (OSError, SafetensorError) as error:  # they are computed again in the next run
            log.warning("class features are not cached in %s: %s", path.parent, error)
    return class_CD


def class_prompt_tokens(tower: Tower, prompts: PromptSet) -> Tensor:
    """Token ids (C, T, L) of every class in every template, trimmed if that does not change the features.

    Raises:
        InputError: two classes have the same tokens in all templates: the tower cannot tell them apart. (Unless the
            prompt set accepts duplicates.)
    """
    return _tokenize(tower, prompts).view(prompts.num_classes, prompts.num_templates, -1)


def _tokenize(tower: Tower, prompts: PromptSet) -> Tensor:
    """Token ids (C * T, L), checked; those of a tokenizer that is still in use are remembered."""
    known = _TOKENS.setdefault(tower.tokenizer, {})
    made_of = (tower.text_tokenizer.pooling, prompts)
    if made_of not in known:
        known[made_of] = _tokenize_anew(tower, prompts)
    return known[made_of]


_TOKENS: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()


def _tokenize_anew(tower: Tower, prompts: PromptSet) -> Tensor:
    tokens_NL = tower.tokenize(prompts.texts())
    context = getattr(tower.tokenizer, "context_length", None)
    full = 0
    if tokens_NL.shape[1] == context:
        padding = tower.tokenizer([""])[0, -1]
        full = int((tokens_NL[:, -1] != padding).sum())
    if full:
        log.warning(
            "model %s, prompts %s: %d of %d prompts fill the context of %d tokens, where longer ones are cut",
            tower.name,
            prompts.name,
            full,
            len(tokens_NL),
            context,
        )
    first: dict[bytes, int] = {}
    for number, tokens_TL in enumerate(tokens_NL.view(prompts.num_classes, -1).numpy()):
        earlier = first.setdefault(hashlib.blake2b(tokens_TL.tobytes(), digest_size=16).digest(), number)
        if earlier != number and not prompts.duplicates:
            names = prompts.classnames
            raise InputError(
                f"prompts {prompts.name}: classes {names[earlier]!r} ({earlier}) and {names[number]!r} ({number}) have "
                f"the same tokens for model {tower.name}; allowed: names that differ in more than case, blanks, "
                "characters unknown to it, or what follows the context length"
            )
    return tokens_NL


def _load(path: Path, key: str, *, shape: tuple[int, int]) -> Tensor | None:
    """The features in a file; None if it is missing, or not what was written under this key."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            class_CD: Tensor = file.get_tensor("embeddings")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged, and replaced: %s", path, " ".join(str(error).split()))
        return None
    if class_CD.shape != shape or metadata != {"key": key, "digest": _digest(class_CD)}:
        log.warning("%s is not what was written, and is replaced", path)
        return None
    return class_CD


def _digest(class_CD: Tensor) -> str:
    return hashlib.sha256(f"{class_CD.dtype}".encode() + class_CD.numpy().tobytes()).hexdigest()
