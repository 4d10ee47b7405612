"""Inherited weights: exact where nothing is cut, and where what is cut could not matter; refusals by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdistill.config import load_config, save_config
from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation
from clipdistill.export import export_open_clip
from clipdistill.models.inheritance import inherit
from clipdistill.models.loading import StudentSettings, load_frozen_model, load_student
from clipdistill.models.towers import FrozenModel, Tower
from clipdistill.training.trainer import train

TEXTS = ["red", "a green picture", "something blue"]

LARGE: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 6, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 4},
}


def write_model(folder: Path, name: str, *, image: dict[str, Any] = {}, text: dict[str, Any] = {}, **top: Any) -> str:  # noqa: B006
    """A model config like LARGE, with changes."""
    config = {**LARGE, **top, "vision_cfg": LARGE["vision_cfg"] | image, "text_cfg": LARGE["text_cfg"] | text}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inherit")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> FrozenModel:
    """Random weights, of a size that makes every block matter, and pixel settings of its own."""
    torch.manual_seed(3)
    large = load_student(write_model(folder, "inherit-large"), logit_scale=17.0)
    with torch.no_grad():
        for parameter in large.clip.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn_like(parameter))
    large.set_preprocessing({"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "mode": "RGB",
                             "resize_mode": "squash", "fill_color": 0, "size": 16})  # fmt: skip
    export_open_clip(large, folder / "large")
    return load_frozen_model(f"local-dir:{folder / 'large'}")


def pictures() -> Tensor:
    return torch.randint(0, 256, (5, 3, 40, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(tower: Tower) -> Tensor:
    scale = tower.clip.logit_scale.exp()
    return scale * tower.encode_image(pictures()) @ tower.encode_tokens(tower.tokenize(TEXTS)).T


@pytest.mark.parametrize("width", ["leading", "largest"])
@pytest.mark.parametrize("source", ["teacher", "folder", "file", "compiled file"])
def test_nothing_cut_gives_the_teachers_logits(
    folder: Path, teacher: FrozenModel, source: str, width: str, tmp_path: Path
) -> None:
    names = {"teacher": "teacher", "folder": str(folder / "large")}
    if source not in names:
        prefix = "module._orig_mod." if source == "compiled file" else ""
        names[source] = str(tmp_path / "weights.pt")
        torch.save({f"{prefix}{key}": value for key, value in teacher.clip.state_dict().items()}, names[source])
    init = {"from": names[source], "width": width}
    model = write_model(folder, "inherit-large")
    student = StudentSettings.model_validate({"model": model, "init": init}).load([teacher]).eval()
    if "file" in source:  # weights say nothing of pixels
        student.set_preprocessing({"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "mode": "RGB",
                                   "resize_mode": "squash", "fill_color": 0})  # fmt: skip
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "image", "text"),
    [("every", [0, 3], [0, 1, 2]), ("first", [0, 1], [0, 1, 2]), ("last", [4, 5], [1, 2, 3])],
)
def test_layers_are_those_of_the_rule(
    folder: Path, teacher: FrozenModel, layers: str, image: list[int], text: list[int]
) -> None:
    """The student equals the teacher with the other blocks taken out."""
    model = write_model(folder, "inherit-shallow", image={"layers": 2}, text={"layers": 3})
    settings = {"model": model, "init": {"from": "teacher", "layers": layers}}
    student = StudentSettings.model_validate(settings).load([teacher]).eval()
    cut = load_frozen_model(f"local-dir:{folder / 'large'}")
    for transformer, kept in ((cut.clip.visual.transformer, image), (cut.text.transformer, text)):
        blocks = transformer.resblocks
        transformer.resblocks = torch.nn.ModuleList([blocks[number] for number in kept])
        for block in transformer.resblocks:
            block.__class__ = type(blocks[0])  # not the shortened last one
    torch.testing.assert_close(logits(student), logits(cut), rtol=0, atol=1e-4)


def _silence(tower: Tower, *, width: Tensor, heads: Tensor, hidden: Tensor) -> None:
    """Take channels, heads and hidden units out of an image tower without removing them: their weights become 0."""
    visual = tower.clip.visual
    with torch.no_grad():
        gone = torch.ones(48, dtype=torch.bool)
        gone[width] = False
        visual.conv1.weight[gone] = 0
        visual.class_embedding[gone] = 0
        visual.positional_embedding[:, gone] = 0
        for block in visual.transformer.resblocks:
            rows = torch.ones(4, 12, dtype=torch.bool)
            rows[heads] = False
            block.attn.in_proj_weight.view(3, 4, 12, 48)[:, rows.view(4, 12).all(1)] = 0
            block.attn.in_proj_bias.view(3, 4, 12)[:, rows.all(1)] = 0
            block.attn.out_proj.weight.view(48, 4, 12)[:, rows.all(1)] = 0
            block.attn.out_proj.weight[gone] = 0
            block.attn.out_proj.bias[gone] = 0
            units = torch.ones(192, dtype=torch.bool)
            units[hidden] = False
            block.mlp.c_fc.weight[units] = 0
            block.mlp.c_fc.bias[units] = 0
            block.mlp.c_proj.weight[:, units] = 0
            block.mlp.c_proj.weight[gone] = 0
            block.mlp.c_proj.bias[gone] = 0


@pytest.mark.parametrize("width", ["leading", "largest"])
def test_heads_and_hidden_units_that_do_nothing_are_cut_without_a_change(
    folder: Path, width: str, tmp_path: Path
) -> None:
    """Three of four heads and half of the hidden units remain; the residual stream keeps its width."""
    teacher = load_frozen_model(f"local-dir:{folder / 'large'}")
    first = width == "leading"
    heads = torch.tensor([0, 1, 2] if first else [0, 2, 3])
    hidden = torch.arange(96) if first else torch.arange(1, 192, 2)
    _silence(teacher, width=torch.arange(48), heads=heads, hidden=hidden)
    slim = load_student(write_model(folder, "inherit-large"))
    for block in slim.clip.visual.transformer.resblocks:
        _slim(block, heads=3, hidden=96)
    inherit(slim.clip.visual, teacher.clip.visual, layers="every", width=width, what="image tower")  # type: ignore[arg-type]
    slim.set_preprocessing({"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "mode": "RGB",
                            "resize_mode": "squash", "fill_color": 0})  # fmt: skip
    slim.eval()
    torch.testing.assert_close(slim.encode_image(pictures()), teacher.encode_image(pictures()), rtol=0, atol=1e-5)


def _slim(block: Any, *, heads: int, hidden: int) -> None:
    """Give a block attention with fewer heads of 12 dimensions, and fewer hidden units, at the same width."""
    block.attn = _Attention(heads)
    block.mlp.c_fc = torch.nn.Linear(48, hidden)
    block.mlp.c_proj = torch.nn.Linear(hidden, 48)


class _Attention(torch.nn.Module):
    """Self-attention written out, with nn.MultiheadAttention's names and an inner width of its own."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj_weight = torch.nn.Parameter(torch.zeros(3 * heads * 12, 48))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * heads * 12))
        self.out_proj = torch.nn.Linear(heads * 12, 48)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        count = self.num_heads * 12
        weight, bias = self.in_proj_weight, self.in_proj_bias
        parts = [
            (x @ weight[n * count : (n + 1) * count].T + bias[n * count : (n + 1) * count])
            .unflatten(-1, (self.num_heads, 12)).transpose(1, 2)
            for n, x in enumerate((query, key, value))
        ]  # fmt: skip
        weights = (parts[0] @ parts[1].transpose(-1, -2) / 12**0.5).softmax(-1)
        return self.out_proj((weights @ parts[2]).transpose(1, 2).flatten(2)), None


def test_a_narrower_student_has_the_leading_parts(folder: Path, teacher: FrozenModel) -> None:
    model = write_model(
        folder, "inherit-narrow", embed_dim=20,
        image={"width": 24, "layers": 3, "head_width": 6}, text={"width": 16, "heads": 2, "layers": 2},
    )  # fmt: skip
    student = StudentSettings.model_validate({"model": model, "init": {"from": "teacher"}}).load([teacher])
    ours, theirs = student.clip.visual, teacher.clip.visual
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight[:24])
    assert torch.equal(ours.positional_embedding, theirs.positional_embedding[:, :24])
    assert torch.equal(ours.proj, theirs.proj[:24, :20])
    for number, original in enumerate((0, 2, 4)):
        mine, his = ours.transformer.resblocks[number], theirs.transformer.resblocks[original]
        # 4 heads of 12 dimensions become 4 of 6: the leading ones of each head, for queries, keys and values
        expected = his.attn.in_proj_weight.view(3, 4, 12, 48)[:, :, :6, :24].reshape(72, 24)
        assert torch.equal(mine.attn.in_proj_weight, expected)
        assert torch.equal(
            mine.attn.out_proj.weight, his.attn.out_proj.weight.view(48, 4, 12)[:24, :, :6].reshape(24, 24)
        )
        assert torch.equal(mine.mlp.c_fc.weight, his.mlp.c_fc.weight[:96, :24])
        assert torch.equal(mine.mlp.c_proj.weight, his.mlp.c_proj.weight[:24, :96])
    mine, his = student.text.transformer.resblocks[1], teacher.text.transformer.resblocks[2]
    # 4 heads of 8 dimensions become 2 of 8
    expected = his.attn.in_proj_weight.view(3, 4, 8, 32)[:, :2, :, :16].reshape(48, 16)
    assert torch.equal(mine.attn.in_proj_weight, expected)
    assert torch.equal(student.text.token_embedding.weight, teacher.text.token_embedding.weight[:, :16])
    assert student.clip.logit_scale.exp().item() == pytest.approx(17.0, rel=1e-5)


def test_the_largest_channels_are_kept_by_their_norm(folder: Path, teacher: FrozenModel) -> None:
    model = write_model(folder, "inherit-half", image={"width": 24}, text={"width": 32})
    settings = {"model": model, "init": {"from": "teacher", "width": "largest", "towers": "image"}}
    student = StudentSettings.model_validate(settings).load([teacher])
    visual = teacher.clip.visual
    total = visual.conv1.weight.square().sum((1, 2, 3)) + visual.positional_embedding.square().sum(0)
    total = total + visual.proj.square().sum(1)
    for block in visual.transformer.resblocks:
        total = total + block.attn.in_proj_weight.square().sum(0) + block.attn.out_proj.weight.square().sum(1)
        total = total + block.mlp.c_fc.weight.square().sum(0) + block.mlp.c_proj.weight.square().sum(1)
    kept = total.topk(24).indices.sort().values
    assert not torch.equal(kept, torch.arange(24))
    assert torch.equal(student.clip.visual.conv1.weight, visual.conv1.weight[kept])


def test_positions_are_interpolated_to_another_grid(folder: Path, teacher: FrozenModel) -> None:
    """A grid of equal embeddings stays so, and the class token's stays its own."""
    source = load_frozen_model(f"local-dir:{folder / 'large'}")
    with torch.no_grad():
        source.clip.visual.positional_embedding[1:] = source.clip.visual.positional_embedding[1].clone()
    model = write_model(folder, "inherit-grid", image={"image_size": 32})
    student = StudentSettings.model_validate({"model": model, "init": {"from": "teacher"}}).load([source])
    ours, theirs = student.clip.visual.positional_embedding, source.clip.visual.positional_embedding
    assert ours.shape == (17, 48)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1:], theirs[1].expand(16, 48), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])  # the second pools by attention
@pytest.mark.parametrize("width", ["leading", "largest"])
def test_a_vision_transformer_of_timm_inherits(name: str, width: str, teacher: FrozenModel, tmp_path: Path) -> None:
    settings = {"model": f"timm/{name}", "text": "teacher"}
    torch.manual_seed(2)
    large = StudentSettings.model_validate(settings).load([teacher])
    export_open_clip(large, tmp_path / "large")
    inherited = settings | {"init": {"from": str(tmp_path / "large"), "width": width}}
    student = StudentSettings.model_validate(inherited).load([teacher]).eval()
    torch.testing.assert_close(
        student.encode_image(pictures()), large.eval().encode_image(pictures()), rtol=0, atol=1e-5
    )


def test_a_run_from_inherited_weights_resumes_and_starts_the_next_one(
    folder: Path, teacher: FrozenModel, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_model(folder, "inherit-shallow", image={"layers": 2}, text={"layers": 3})
    changes = {"student": {"model": model, "init": {"from": "teacher"}}, "teachers": [{"model": teacher.name}]}
    config = load_config(write_config(**changes), ["train.steps=2", "train.save_every=1"])
    result = train(config)
    saved = load_config(result.output / "config.yaml")
    assert saved.student.init == config.student.init
    save_config(saved, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == saved
    train(saved, resume="auto")
    whole, last = (load_for_evaluation(str(result.output), step=step) for step in (None, 2))
    torch.testing.assert_close(whole.encode_image(pictures()), last.encode_image(pictures()), rtol=0, atol=1e-6)
    of_run = StudentSettings.model_validate({"model": model, "init": {"from": str(result.output)}})
    student, finished = of_run.load().eval(), load_frozen_model(f"local-dir:{result.student}")
    torch.testing.assert_close(logits(student), logits(finished), rtol=0, atol=1e-4)
    # the same architecture from other weights is another run
    other = load_config(write_config(**changes), ["train.steps=2", "train.save_every=1", "student.init.layers=last"])
    with pytest.raises(InputError, match=r"student\.init\.layers"):
        train(other, resume="auto")


@pytest.mark.parametrize(
    ("changes", "init", "message"),
    [
        ({"image": {"layers": 7}}, {}, "transformer.resblocks of the image tower has 7 blocks in the student, and 6"),
        ({"image": {"width": 60}}, {}, "of the image tower is [48"),
        ({"image": {"patch_size": 4}}, {}, "conv1.weight of the image tower is [48, 3, 8, 8] in the source"),
        ({"text": {"context_length": 16}}, {}, "allowed: a context of at most 12 tokens"),
        ({"text": {"vocab_size": 50000}}, {}, "token_embedding.weight of the text tower is [49408, 32]"),
        ({"quick_gelu": True}, {}, "vision_cfg.quick_gelu is False in the source and True in the student"),
        ({"text": {"pool_type": "last"}}, {}, "text_cfg.pool_type is 'argmax' in the source and 'last' in the student"),
        ({"embed_dim": 32}, {}, "embeddings of 24 dimensions, the student's have 32"),
        ({"image": {"layers": [1, 1, 1, 1], "width": 16}}, {}, "image tower has bn1.weight, and the source has no bn1"),
        ({"image": {"head_width": 16}}, {}, "3 heads of 16 dimensions, the source 4 of 12"),
        ({}, {"towers": "text"}, "student.init.towers: 'text' with student.text: teacher; allowed: image"),
        ({}, {"from": "nowhere"}, "nowhere: no open_clip_config.json in it or in student/; allowed: teacher"),
        ({}, {"layers": "some"}, "init.layers: 'some' is not allowed; allowed: every, first, last"),
        ({}, {"form": "teacher"}, "init.form: unknown config key; nearest valid key: from"),
    ],
)  # fmt: skip
def test_what_does_not_map_is_named(
    folder: Path, teacher: FrozenModel, write_config: Callable[..., Path], changes: Any, init: Any, message: str
) -> None:
    student = {"model": write_model(folder, "inherit-other", **changes), "init": {"from": "teacher"} | init}
    student |= {"text": "teacher"} if "towers" in init else {}
    with pytest.raises(InputError) as error:
        train(load_config(write_config(student=student, teachers=[{"model": teacher.name}])))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
