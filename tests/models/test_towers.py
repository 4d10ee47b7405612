"""Towers against open_clip's own paths: transforms, trimming, freezing, text modes, loading errors."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models.class_embeddings import class_embeddings, class_prompt_tokens
from clipdistill.models.loading import create_clip, load_frozen_model, load_student
from clipdistill.models.prompts import PromptSet
from clipdistill.models.tokens import TextTokenizer
from clipdistill.models.towers import FrozenModel, PixelTransform, Student
from tests.conftest import TINY_MODEL


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Student:
    torch.manual_seed(0)
    return load_student(str(tiny_model)).eval()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixel_transform_equals_open_clips_on_pillow(interpolation: str) -> None:
    """On a smooth picture, where Pillow's rounding to bytes between its two passes costs at most one grey level."""
    ramp = torch.linspace(0, 255, 64)
    pixels = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, 255 - ramp.expand(64, 64)]).round().byte()
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    ours = PixelTransform(size=24, mean=mean, std=std, interpolation=interpolation)(pixels[None])[0]
    config = PreprocessCfg(size=24, mean=mean, std=std, interpolation=interpolation)
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert (ours - theirs).abs().max() < 1.1 / 255 / 0.26


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (48, 16), (20, 32)])
@pytest.mark.parametrize("source", [(64, 64), (40, 90), (96, 32)])
def test_pixel_transform_of_any_aspect_ratio_equals_open_clips(
    mode: str, size: tuple[int, int], source: tuple[int, int]
) -> None:
    down, across = (torch.linspace(0, 255, length) for length in source)
    pixels = torch.stack([across.expand(source), down.expand(*source[::-1]).T, 255 - across.expand(source)])
    pixels = pixels.round().byte()
    config = PreprocessCfg(size=size, interpolation="bicubic", resize_mode=mode, fill_color=99)
    settings = {"mean": config.mean, "std": config.std, "interpolation": "bicubic"}
    ours = PixelTransform(size=size, resize_mode=mode, fill=99, **settings)(pixels[None])[0]
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert ours.shape == theirs.shape == (3, *size)
    assert (ours - theirs).abs().max() < 1.6 / 255 / min(config.std)


def test_pixel_transform_without_resize_is_exact() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    out = PixelTransform(size=8, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")(pixels)
    torch.testing.assert_close(out, (pixels / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "MobileCLIP-S1"])
def test_weights_stored_in_bfloat16_are_those_that_autocast_uses(name: str) -> None:
    """As on a GPU, where nn.MultiheadAttention has no fast path under autocast."""
    torch.manual_seed(0)
    tower = FrozenModel(name, *create_clip(name, need_weights=False), precision="bf16")
    image_BCHW = torch.randint(0, 256, (2, 3, *tower.image_size), dtype=torch.uint8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before_BD = tower.encode_image(image_BCHW)
        tower.store_as_used()
        after_BD = tower.encode_image(image_BCHW)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(before_BD, after_BD)
    parameters = list(tower.clip.visual.parameters())
    stored = sum(parameter.nbytes for parameter in parameters)
    assert stored < 0.55 * 4 * sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_trimmed_columns_change_nothing(custom_text: bool, pool: str, tmp_path: Path) -> None:
    """For both kinds of text tower that open_clip has: inside CLIP, and as a module of its own."""
    text = {**TINY_MODEL["text_cfg"], "pool_type": pool, "eos_id": 49407}
    path = tmp_path / f"trim-{custom_text}-{pool}.json"
    path.write_text(json.dumps({**TINY_MODEL, "text_cfg": text, "custom_text": custom_text}))
    torch.manual_seed(0)
    tower = load_student(str(path)).eval()
    assert isinstance(tower.clip, open_clip.CustomTextCLIP) == custom_text
    texts = ["a photo of a cat.", "tattoo", ""]
    trimmed, whole = tower.tokenize(texts), tower.tokenizer(texts)
    assert trimmed.shape[1] == 8
    assert whole.shape[1] == 12
    with torch.no_grad():
        theirs = tower.clip.encode_text(whole, normalize=True)
        torch.testing.assert_close(tower.encode_tokens(trimmed), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("multiple", "columns"), [(1, 7), (2, 8), (5, 10), (8, 8), (11, 11), (13, 12)])
def test_columns_are_rounded_up_as_far_as_the_context(tiny: Student, multiple: int, columns: int) -> None:
    texts = ["red", "a rather long caption here"]
    tokenizer = TextTokenizer(tiny.tokenizer, "argmax", multiple=multiple)
    tokens = tokenizer(texts)
    assert tokens.shape[1] == columns
    torch.testing.assert_close(tiny.encode_tokens(tokens), tiny.encode_tokens(tiny.tokenize(texts)))


def test_trimming_keeps_gradients(tiny: Student) -> None:
    texts = ["red", "a green picture"]

    def gradients(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        tiny.zero_grad()
        (tiny.encode_tokens(tokens) * torch.arange(16.0)).sum().backward()
        return {name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None}

    trimmed, whole = gradients(tiny.tokenize(texts)), gradients(tiny.tokenizer(texts))
    assert trimmed.keys() == whole.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(trimmed[name], grad, rtol=1e-3, atol=1e-4)


def test_bidirectional_text_tower_is_not_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "both-ways.json"
    path.write_text(json.dumps({**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "no_causal_mask": True}}))
    assert load_student(str(path)).tokenize(["red"]).shape == (1, 12)


def test_teacher_stays_frozen_and_in_eval_mode_inside_a_training_module(teacher_folder: Path) -> None:
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    holder = nn.ModuleDict({"teacher": teacher, "layer": nn.Linear(2, 2)})
    holder.train()
    assert holder["layer"].training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.encode_image(torch.zeros(1, 3, 20, 20, dtype=torch.uint8)).requires_grad


def test_student_with_the_teachers_text_tower(tiny_model: Path, teacher_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-width.json"
    other.write_text(json.dumps({**TINY_MODEL, "embed_dim": 24}))
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    student = load_student(str(other), text_mode="teacher", teacher=teacher).train()
    assert student.embed_dim == teacher.embed_dim == 16
    tokens = student.tokenize(["red", "a blue picture"])
    assert torch.equal(student.encode_tokens(tokens), teacher.encode_tokens(tokens))
    trained = {name.split(".")[1] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"visual", "logit_scale"}
    assert student.clip.logit_scale.exp().item() == pytest.approx(20.0)


def test_teachers_text_tower_reaches_a_student_of_the_other_kind(teacher_folder: Path, tmp_path: Path) -> None:
    """open_clip keeps the text tower inside CLIP, or as a module ``text``: the names differ."""
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    path = tmp_path / "custom-text.json"
    path.write_text(json.dumps({**TINY_MODEL, "custom_text": True}))
    student = load_student(str(path), text_mode="teacher", teacher=teacher).eval()
    tokens = student.tokenize(["red", "a blue picture"])
    torch.testing.assert_close(student.encode_tokens(tokens), teacher.encode_tokens(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [100.0, 3.0])
def test_logit_scale_learns_and_is_capped(tiny_model: Path, start: float) -> None:
    student = load_student(str(tiny_model), logit_scale=start)
    student().scale.backward()
    assert student.clip.logit_scale.grad > 0
    with torch.no_grad():
        student.clip.logit_scale.add_(10.0)
    student.cap_logit_scale()
    assert student().scale.item() == pytest.approx(100.0, rel=1e-6)


def test_pretrained_image_tower_is_kept_up_to_the_projection(
    tiny_model: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "wide-start.json"
    other.write_text(json.dumps({**TINY_MODEL, "embed_dim": 24}))
    start = load_student(str(other))
    save_file(start.clip.state_dict(), tmp_path / "start.safetensors")
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    student = load_student(
        str(other), pretrained=str(tmp_path / "start.safetensors"), text_mode="teacher", teacher=teacher
    )
    theirs, ours = start.clip.visual.state_dict(), student.clip.visual.state_dict()
    assert ours["proj"].shape == (32, 16)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if name != "proj")


@pytest.mark.parametrize("templates", [("{c}",), ("{c}", "a {c} picture", "one {c} thing")])
def test_bank_equals_open_clips_zero_shot_classifier(tiny: Student, templates: tuple[str, ...]) -> None:
    prompts = PromptSet(name="t", classnames=("red", "green", "dark blue"), templates=templates)
    theirs = open_clip.build_zero_shot_classifier(
        tiny.clip,
        tiny.tokenizer,
        prompts.classnames,
        [lambda name, template=template: template.replace("{c}", name) for template in templates],
    ).T
    torch.testing.assert_close(class_embeddings(tiny, prompts), theirs, rtol=0, atol=1e-6)
    with torch.no_grad():
        trained = tiny.encode_prompts(class_prompt_tokens(tiny, prompts))
    torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-6)


def test_bank_cache_follows_weights_and_prompts_and_survives_damage(tiny_model: Path, tmp_path: Path) -> None:
    prompts = PromptSet(name="t", classnames=("red", "green"), templates=("{c}",))
    student = load_student(str(tiny_model)).eval()
    first = class_embeddings(student, prompts, cache=tmp_path)
    (file,) = (tmp_path / "class_embeddings").iterdir()
    assert torch.equal(class_embeddings(student, prompts, cache=tmp_path), first)
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(class_embeddings(student, prompts, cache=tmp_path), first)
    with torch.no_grad():
        student.clip.text_projection.add_(1.0)
    assert not torch.equal(class_embeddings(student, prompts, cache=tmp_path), first)
    assert len(list((tmp_path / "class_embeddings").iterdir())) == 2


@pytest.mark.parametrize("change", ["reversed rows", "another shape", "no digest"])
def test_a_bank_that_is_not_what_was_written_is_replaced(
    change: str, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = PromptSet(name="t", classnames=("red", "green", "blue"), templates=("{c}",))
    student = load_student(str(tiny_model)).eval()
    expected = class_embeddings(student, prompts, cache=tmp_path)
    (file,) = (tmp_path / "class_embeddings").iterdir()
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    rows = {"reversed rows": expected.flip(0), "another shape": expected[:2], "no digest": expected}[change]
    save_file({"embeddings": rows.contiguous()}, file, metadata=None if change == "no digest" else metadata)
    assert torch.equal(class_embeddings(student, prompts, cache=tmp_path), expected)
    assert f"{file} is not what was written, and is replaced" in caplog.text
    caplog.clear()
    assert torch.equal(class_embeddings(student, prompts, cache=tmp_path), expected)
    assert caplog.text == ""


def test_a_stored_bank_needs_no_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Tokens of 100,000 names in 80 templates take minutes, at every start."""
    prompts = PromptSet(name="t", classnames=("red", "green"), templates=("{c}",))
    student = load_student(str(tiny_model)).eval()
    stored = class_embeddings(student, prompts, cache=tmp_path)
    student.tokenizer.encode = None  # SimpleTokenizer calls it for every text
    assert torch.equal(class_embeddings(student, prompts, cache=tmp_path), stored)
    with pytest.raises(TypeError):
        class_embeddings(student, PromptSet(name="t", classnames=("a", "b"), templates=("{c}",)), cache=tmp_path)


def test_the_digest_of_a_tokenizer_is_that_of_its_vocabulary_and_settings(tiny: Student) -> None:
    digests = set()
    for settings in ({}, {"context_length": 8}, {"clean": "whitespace"}, {"additional_special_tokens": ["<a>"]}):
        first, second = (TextTokenizer(SimpleTokenizer(**settings), "argmax") for _ in range(2))
        first(["words that enter its cache"])
        assert first.digest() == second.digest() is not None
        digests.add(first.digest())
    assert len(digests) == 4
    assert TextTokenizer(SimpleTokenizer(reduction_mask="random", context_length=8), "argmax").digest() is None
    assert TextTokenizer(str.split, None).digest() is None


@pytest.mark.parametrize(
    ("names", "twins"),
    [
        (("red", "blue", "Red"), ("red", "Red")),
        (("grey  cat", "grey cat"), ("grey  cat", "grey cat")),
        (("a " * 20 + "dog", "a " * 20 + "cat"), None),
    ],
)
def test_classes_that_the_tokenizer_cannot_tell_apart_are_refused(
    tiny: Student,
    names: tuple[str, ...],
    twins: tuple[str, str] | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = PromptSet(name="t", classnames=names, templates=("{c}", "a {c} picture"))
    first, second = twins or names
    accepted = replace(prompts, duplicates=True)
    assert len(class_embeddings(tiny, accepted, cache=tmp_path)) == len(names)
    for use in (class_embeddings, class_prompt_tokens, partial(class_embeddings, cache=tmp_path)):
        with pytest.raises(InputError) as caught:
            use(tiny, prompts)
        assert f"classes {first!r} (0) and {second!r} (" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert ("4 of 4 prompts fill the context of 12 tokens" in caplog.text) == (twins is None)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "", r"^model ViT-B-33: unknown; nearest: ViT-B-32"),
        ("ViT-B-32", "", r"^model ViT-B-32: pretrained is empty; allowed: openai, "),
        ("ViT-B-32", "nope", r"^model ViT-B-32, pretrained nope: cannot be loaded"),
        ("local-dir:/no/such", "", r"^model local-dir:/no/such: no open_clip_config.json"),
        ("hf-hub:nobody/nothing", "", r"^model hf-hub:nobody/nothing: cannot be loaded"),
        ("coca_ViT-B-32", "x", r"captioning model"),
        ("missing.json", "", r"^model missing.json: no such file"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_frozen_model(model, pretrained=pretrained)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture(teacher_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "deeper.json"
    path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 3}}))
    with pytest.raises(InputError, match="weights do not match the architecture"):
        load_frozen_model(str(path), pretrained=str(teacher_folder / "open_clip_model.safetensors"))


def test_prompts_are_tokenised_once(tiny_model: Path) -> None:
    class Counting(SimpleTokenizer):
        calls = 0

        def __call__(self, texts, context_length=None):
            self.calls += len(texts) if isinstance(texts, list) else 1
            return super().__call__(texts, context_length)

    tower = load_student(str(tiny_model))
    tower.tokenizer = Counting(context_length=12)
    few = PromptSet(name="few", classnames=("cat", "dog"), templates=("{c}", "a {c}"))
    others = replace(few, templates=("{c}", "the {c}"))
    first = class_prompt_tokens(tower, few)
    calls = tower.tokenizer.calls
    assert torch.equal(class_prompt_tokens(tower, few), first)
    assert tower.tokenizer.calls == calls
    assert not torch.equal(class_prompt_tokens(tower, others), first)
    assert torch.equal(class_prompt_tokens(tower, few), class_prompt_tokens(load_student(str(tiny_model)), few))
