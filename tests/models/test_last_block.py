"""The shortened last block against open_clip's own towers: features, gradients, and the towers that it leaves alone."""

import copy
import json
from typing import Any

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.models.last_block import LastBlock, all_tokens
from clipdistill.models.loading import load_student
from clipdistill.models.towers import Student

TEXTS = ["a cat", "a photo of two very small dogs, in the rain", "x"]
VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EOS = {"pool_type": "eos", "eos_id": 49407}


def tower(config: dict[str, Any], tmp_path: Any) -> tuple[Student, Any]:
    """A student, and open_clip's own model with the same weights."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT} | config))
    torch.manual_seed(3)
    ours = load_student(str(path))
    open_clip.add_model_config(path)
    theirs = open_clip.create_model("small")
    theirs.load_state_dict(ours.clip.state_dict())
    return ours, theirs


CONFIGS = {
    "plain": {},
    "layer scale": {"vision_cfg": VISION | {"ls_init_value": 0.3}, "text_cfg": TEXT | {"ls_init_value": 0.3}},
    "patch dropout": {"vision_cfg": VISION | {"patch_dropout": 0.5}},
    "norm after pooling": {"vision_cfg": VISION | {"final_ln_after_pool": True}},
    "text apart": {"custom_text": True, "text_cfg": TEXT | EOS},
    "mean of tokens": {"vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True}},
    "class token of texts": {"custom_text": True, "text_cfg": TEXT | {"embed_cls": True}},
    "text not causal": {"custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}},
    "its own attention": {"vision_cfg": VISION | {"scale_heads": True}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_features_and_gradients_are_open_clips(tmp_path: Any, config: dict[str, Any], training: bool) -> None:
    ours, theirs = tower(config, tmp_path)
    ours.train(training)
    theirs.train(training)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = ours.tokenizer(TEXTS)
    torch.manual_seed(5)
    found = [ours.encode_image(images), ours.encode_tokens(ours.tokenize(TEXTS))]
    torch.manual_seed(5)
    expected = [
        torch.nn.functional.normalize(theirs.encode_image(ours.pixels(images)), dim=-1),
        torch.nn.functional.normalize(theirs.encode_text(tokens), dim=-1),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    weights = torch.randn(3, 24)
    for features in (found, expected):
        sum((each * weights).sum() for each in features).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.clip.named_parameters():
        other = gradients[name].grad
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, atol=1e-5 * float(other.abs().max()) + 1e-7, rtol=0)


@pytest.mark.slow
def test_a_copy_and_a_compiled_tower_give_the_same(tmp_path: Any) -> None:
    ours, _ = tower({}, tmp_path)
    images, tokens = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), ours.text_tokenizer.grouped(TEXTS)
    expected = ours(images, caption_tokens=tokens)
    average = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    copied = average(images, caption_tokens=tokens)
    assert torch.equal(copied.image_BD, expected.image_BD)
    assert torch.equal(copied.captions_BD, expected.captions_BD)
    average.compile_towers()
    for texts in (TEXTS, TEXTS[:2], ["another text of some length"]):
        tokens = average.text_tokenizer.grouped(texts)
        compiled = average(images, caption_tokens=tokens)
        torch.testing.assert_close(compiled.image_BD, expected.image_BD, atol=1e-5, rtol=0)
        if texts != ["another text of some length"]:
            torch.testing.assert_close(compiled.captions_BD, expected.captions_BD[: len(texts)], atol=1e-5, rtol=0)


def test_most_products_of_the_last_block_are_spared(tmp_path: Any) -> None:
    """Those of queries, output projection and MLP, of all tokens but one: 10 D^2 of 12 D^2."""
    ours, _ = tower({"vision_cfg": VISION | {"image_size": 64, "patch_size": 4, "layers": 2}}, tmp_path)
    counts = []
    for context in (all_tokens(ours.clip.visual), torch.enable_grad()):
        with context, FlopCounterMode(display=False) as counter:
            ours.encode_image(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * (257 - 1) * (2 * 10 * 64**2)  # the counter knows no fused attention


def test_state_and_names_stay(tmp_path: Any) -> None:
    ours, theirs = tower({}, tmp_path)
    assert list(ours.clip.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours.clip.visual.transformer.resblocks[-1], LastBlock)
    assert not any(isinstance(module, LastBlock) for module in theirs.modules())
