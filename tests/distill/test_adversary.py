"""The training attack: against one written out by hand, its noise against SplitMix64, and what it leaves alone."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from clipdistill.data import Batch, StreamLoader, expand_urls, index_shards
from clipdistill.distill.adversary import AdversarialSettings, Adversary, hashed_uniform
from clipdistill.distill.objective import Objective
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.targets import Targets, make_targets
from clipdistill.distill.teachers import Teachers
from clipdistill.errors import InputError
from clipdistill.losses import CLIP, GKL, KL, Feature, Loss, gkl_loss
from clipdistill.models.class_embeddings import class_prompt_tokens, similarity_logits
from clipdistill.models.loading import load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.models.towers import FrozenModel, Student
from clipdistill.settings import validate
from tests.streams import make_stream

TERM = GKL(gamma=0.5, beta=0.3, weight=2.0)

pytestmark = pytest.mark.usefixtures("accelerator")


@pytest.fixture
def batches(colours: Path) -> list[Batch]:
    index = index_shards(expand_urls([str(colours / "train")]), cache_dir=None)
    return list(islice(StreamLoader(make_stream(index, batch_size=6, image_size=20)), 2))


class Setting:
    """A student, the targets of some batches, and the attack on it."""

    def __init__(
        self, teacher: FrozenModel, tiny_model: Path, colours: Path, *terms: Loss, text: str = "teacher", **changes: Any
    ) -> None:
        torch.manual_seed(0)
        prompts = load_prompts(str(colours / "prompts"))
        self.student = load_student(str(tiny_model), text_mode=text, teacher=teacher if text == "teacher" else None)
        self.teachers = Teachers([teacher], tokenizers=[0])
        self.teachers.embed_classes(prompts)
        self.objective = Objective(terms or [TERM], teacher_weights=[1.0])
        texts = {"class_CD": self.teachers.class_embeddings[0]}
        if text == "train":
            texts = {"class_tokens_CTL": class_prompt_tokens(self.student, prompts)}
        settings = validate(AdversarialSettings, {"eps": "8/255", "steps": 3, "start": "clean"} | changes)
        self.adversary = Adversary(
            settings,
            student=self.student,
            objective=self.objective,
            texts=StudentTexts(self.student, **texts),
            seed=5,
            warmup_steps=changes.get("warmup_epochs", 0),
            autocast=Accelerator().autocast,
        )

    def targets(self, batches: list[Batch]) -> list[Targets]:
        outputs = self.teachers.run(batches, captions=False)
        return [make_targets(batch, of_batch, "none") for batch, of_batch in zip(batches, outputs, strict=True)]

    def attack(self, batches: list[Batch], step: int = 0) -> list[Tensor]:
        """The attacked pixels of the micro-batches of one step."""
        targets = self.targets(batches)
        denominators = self.objective.denominators(targets, sum(map(len, batches)))
        return [self.adversary(*each, denominators, step) for each in zip(batches, targets, strict=True)]


def test_is_the_attack_written_out(teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch]) -> None:
    setting = Setting(teacher, tiny_model, colours, step=2 / 255)
    (found,) = setting.attack(batches[:1])
    student, image_BCHW = setting.student.eval(), batches[0].image_BCHW
    class_CD = setting.teachers.class_embeddings[0]
    teacher_BC = similarity_logits(teacher.encode_image(image_BCHW), class_CD, teacher.logit_scale, None)
    clean = student.pixels.resize(image_BCHW)
    assert clean.shape[-2:] == (16, 16)
    expected = clean
    for _ in range(3):
        expected = expected.detach().requires_grad_()
        out = student(expected)
        student_BC = similarity_logits(out.image_BD, class_CD, out.scale, None)
        loss = gkl_loss(student_BC, teacher_BC, gamma=0.5, beta=0.3).loss
        loss.backward()
        moved = expected.detach() + 2 / 255 * expected.grad.sign()
        expected = moved.clamp(clean - 8 / 255, clean + 8 / 255).clamp(0, 1)
    torch.testing.assert_close(found, expected)
    assert (found - clean).abs().max() == pytest.approx(6 / 255, rel=1e-4)


@pytest.mark.parametrize("text", ["teacher", "train"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_micro_batches_are_attacked_as_the_whole_batch(
    teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch], text: str, norm: str
) -> None:
    """The weights of GKL's parts depend on the whole step, noise on the sample alone."""
    terms = [TERM, Feature(over="images", weight=3.0)]
    setting = Setting(teacher, tiny_model, colours, *terms, text=text, norm=norm, eps=0.5, start="uniform")
    whole = Batch(
        image_BCHW=torch.cat([batch.image_BCHW for batch in batches]),
        captions=[caption for batch in batches for caption in batch.captions],
        labels_B=torch.cat([batch.labels_B for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
    )
    (expected,) = setting.attack([whole])
    found = torch.cat(setting.attack(batches))
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.005  # the sign of a gradient of about 0 is rounding


def test_a_two_sided_term_is_attacked_from_the_students_own_answer(
    teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch]
) -> None:
    """TRADES' inner step: its clean softmax, in evaluation mode, is the constant target. A clean term takes no part."""
    terms = [CLIP(over="prompts", clean=True, weight=50.0), KL(two_sided=True)]
    setting = Setting(teacher, tiny_model, colours, *terms, start="normal", step=3 / 255)
    (found,) = setting.attack(batches[:1])
    student, class_CD = setting.student.eval(), setting.teachers.class_embeddings[0]
    pixels = student.pixels.resize(batches[0].image_BCHW)

    def logits(images: Tensor) -> Tensor:
        out = student(images)
        return similarity_logits(out.image_BD, class_CD, out.scale, None)

    target_BC = logits(pixels).softmax(1).detach()
    expected = setting.adversary._start(batches[0], pixels, 8 / 255)
    for _ in range(3):
        expected = expected.clamp(pixels - 8 / 255, pixels + 8 / 255).clamp(0, 1).detach().requires_grad_()
        F.kl_div(logits(expected).log_softmax(1), target_BC, reduction="batchmean").backward()
        expected = expected.detach() + 3 / 255 * expected.grad.sign()
    expected = expected.clamp(pixels - 8 / 255, pixels + 8 / 255).clamp(0, 1)
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.005
    assert (found - pixels).abs().max() > 5 / 255


def test_the_named_term_is_maximised(
    teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch]
) -> None:
    terms = [TERM, Feature(over="images", kind="mse", weight=1e-9)]
    found = {}
    for against in ("gkl_prompts", "feature_images", ""):
        setting = Setting(teacher, tiny_model, colours, *terms, against=against, steps=10, eps="16/255")
        (attacked,) = setting.attack(batches[:1])
        difference_BD = setting.student.eval().encode_image(attacked) - teacher.encode_image(batches[0].image_BCHW)
        found[against] = (attacked, difference_BD.square().sum().item())
    assert found["feature_images"][1] > found["gkl_prompts"][1]
    assert (found[""][0] - found["gkl_prompts"][0]).abs().mean() < 1e-3


def test_what_an_attack_leaves_alone(
    teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch], tmp_path: Path
) -> None:
    """Statistics, mode, gradients and the random state; attacks are the same again."""
    setting = Setting(teacher, tiny_model, colours, start="uniform")
    visual = setting.student.clip.visual
    visual.norm = torch.nn.BatchNorm2d(3)
    visual.register_forward_pre_hook(lambda module, args: (module.norm(args[0]),))
    setting.student.train()
    before = {name: value.clone() for name, value in setting.student.state_dict().items()}
    state = torch.get_rng_state()
    (first,) = setting.attack(batches[:1])
    (second,) = setting.attack(batches[:1])
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert setting.student.training
    for name, value in setting.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in setting.student.parameters())


def test_the_radius_rises(teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch]) -> None:
    setting = Setting(teacher, tiny_model, colours, warmup_epochs=4, steps=1)
    clean = setting.student.pixels.resize(batches[0].image_BCHW)
    moved = [(setting.attack(batches[:1], step)[0] - clean).abs().max().item() for step in (0, 1, 3, 9)]
    assert moved == pytest.approx([2 / 255, 4 / 255, 8 / 255, 8 / 255], rel=1e-4)


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, in Python's integers."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_noise_is_that_of_splitmix64() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 1234567]
    found_BP = hashed_uniform(torch.tensor(seeds), 50)
    for seed, row_P in zip(seeds, found_BP.tolist(), strict=True):
        assert row_P == [(z >> 40) / 2**24 for z in splitmix64(seed % 2**64, 50)]
    values = hashed_uniform(torch.arange(40), 5000).numpy()
    assert values.mean() == pytest.approx(0.5, abs=0.005)
    assert values.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(values)[np.triu_indices(40, 1)]).max() < 0.07


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_noise_depends_on_seed_epoch_and_sample(
    teacher: FrozenModel, tiny_model: Path, colours: Path, batches: list[Batch], start: str
) -> None:
    """Steps of almost no length: what moves is the start."""
    setting = Setting(teacher, tiny_model, colours, start=start, step=1e-9, steps=1)
    clean = setting.student.pixels.resize(batches[0].image_BCHW)
    batch = batches[0]
    (noise,) = (each - clean for each in setting.attack([batch]))
    spread = {"uniform": 8 / 255 / 3**0.5, "normal": 0.001}[start]
    assert noise.std().item() == pytest.approx(spread, rel=0.15)
    order = [3, 0, 5]
    part = Batch(
        image_BCHW=batch.image_BCHW[order],
        captions=[batch.captions[row] for row in order],
        labels_B=batch.labels_B[order],
        keys=[batch.keys[row] for row in order],
    )
    torch.testing.assert_close(setting.attack([part])[0] - clean[order], noise[order], rtol=0, atol=1e-6)
    part.epoch = 1
    assert (setting.attack([part])[0] - clean[order] - noise[order]).abs().mean() > spread / 4


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"eps": "4/255", "steps": 1}, 4 / 255),
        ({"eps": "4/255", "steps": 2}, 4 / 255),
        ({"eps": 0.1, "steps": 10}, 0.025),
    ],
)
def test_the_length_of_a_step(values: dict[str, Any], size: float) -> None:
    assert validate(AdversarialSettings, values).step_size == pytest.approx(size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 0}, "eps: 0 is not allowed"),
        ({"eps": 1.5}, "eps: 1.5 is not allowed; allowed: in (0, 1], or a quotient such as 4/255"),
        ({"eps": "4/0"}, "eps: '4/0' is not allowed"),
        ({"eps": "four"}, "eps: 'four' is not allowed"),
        ({"steps": 0}, "steps: 0 is not allowed"),
        ({"norm": "l1"}, "norm: 'l1' is not allowed"),
        ({"start": "random"}, "start: 'random' is not allowed"),
    ],
)
def test_wrong_settings_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        validate(AdversarialSettings, values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_all_of_open_clips_students_take_pixels_in_the_unit_range(tiny_model: Path) -> None:
    """What an attack returns goes through the student's own normalisation."""
    student: Student = load_student(str(tiny_model))
    image_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(student.pixels(student.pixels.resize(image_BCHW)), student.pixels(image_BCHW))
    config = open_clip.get_model_preprocess_cfg(student.clip)
    assert student.pixels.mean.flatten().tolist() == pytest.approx(list(config["mean"]))
