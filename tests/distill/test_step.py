"""One step of distillation by itself: against the same losses written out by hand, and under a perturbation."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from clipdistill.data import Batch, StreamLoader, expand_urls, index_shards
from clipdistill.distill.objective import Denominators, Objective
from clipdistill.distill.step import DistillationStep
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.targets import Targets
from clipdistill.distill.teachers import Teachers
from clipdistill.distill.weight_attack import WeightAttack
from clipdistill.losses import CLIP, GKL, KL, Loss, gkl_loss
from clipdistill.models.class_embeddings import class_embeddings, class_prompt_tokens, similarity_logits
from clipdistill.models.loading import load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.models.tokens import TokenGroups, cat_tokens
from clipdistill.models.towers import FrozenModel, Student
from tests.streams import make_stream


@pytest.fixture
def student(tiny_model: Path, teacher: FrozenModel) -> Student:
    torch.manual_seed(0)
    return load_student(str(tiny_model), text_mode="teacher", teacher=teacher)


def batches_of(colours: Path, *towers: Student | FrozenModel, count: int = 1) -> list[Batch]:
    index = index_shards(expand_urls([str(colours / "train")]), cache_dir=None)
    tokenizers = [tower.text_tokenizer.grouped for tower in towers]
    stream = make_stream(index, batch_size=6, image_size=16, require_captions=True, tokenizers=tokenizers)
    return list(islice(StreamLoader(stream), count))


def step_of(
    accelerator: Accelerator, student: Student, teacher: FrozenModel, colours: Path, *terms: Loss, **settings
) -> DistillationStep:
    objective = Objective(terms, teacher_weights=[1.0], num_classes=4)
    teachers = Teachers([teacher], tokenizers=[0])
    teachers.embed_classes(load_prompts(str(colours / "prompts")))
    texts = StudentTexts(student, class_CD=teachers.class_embeddings[0], teacher_captions=objective.needs_captions)
    return DistillationStep(
        accelerator=accelerator,
        model=accelerator.prepare(student),
        student=student,
        teachers=teachers,
        objective=objective,
        texts=texts,
        **{"labels": "none", **settings},
    )


def gradients(student: Student) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return found


def test_gradients_are_those_of_the_loss_written_out(
    accelerator: Accelerator, student: Student, teacher: FrozenModel, colours: Path
) -> None:
    term = GKL(gamma=0.5, beta=0.3, weight=2.0)
    (batch,) = batches_of(colours, teacher)
    losses = step_of(accelerator, student, teacher, colours, term)([batch], 0, measure_shares=True)
    found = gradients(student)

    class_CD = class_embeddings(teacher, load_prompts(str(colours / "prompts")))
    out = student(batch.image_BCHW)
    expected = gkl_loss(
        similarity_logits(out.image_BD, class_CD, out.scale, None),
        similarity_logits(teacher.encode_image(batch.image_BCHW), class_CD, teacher.logit_scale, None),
        gamma=0.5,
        beta=0.3,
    )
    (2.0 * expected.loss).backward()
    assert losses.sums["loss"].item() == pytest.approx(2.0 * expected.loss.item(), rel=1e-6)
    assert losses.sums["loss/gkl_prompts/wmse"].item() == pytest.approx(0.3 * expected.wmse.item(), rel=1e-5)
    assert sum(losses.gradient_shares.values()) == pytest.approx(1.0)
    written_out = gradients(student)
    assert found.keys() == written_out.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, written_out[name], rtol=1e-4, atol=1e-7)


def two_sided_losses(clean_BC: Tensor, attacked_BC: Tensor, labels_B: Tensor, prior_CC: Tensor) -> dict[str, Tensor]:
    """CE on the clean side and GKL-AT (GKL.md), over pairs of classes as the paper writes it."""
    weight_BC = prior_CC[labels_B] ** 0.4
    pair_BCC = weight_BC[:, :, None] * weight_BC[:, None, :]
    delta_BC = clean_BC - attacked_BC
    apart_BCC = delta_BC[:, :, None] - delta_BC[:, None, :]
    soft_BC = -clean_BC.softmax(1).detach() * attacked_BC.log_softmax(1)
    return {
        "ce": F.cross_entropy(clean_BC, labels_B),
        "soft_ce": 4.0 * soft_BC.sum(1).mean(),
        "wmse": 20.0 * (pair_BCC * apart_BCC**2).sum() / 4 / pair_BCC.sum(),
    }


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("implementation", ["plain", "tiled"])
def test_clean_and_attacked_images_of_one_student(
    accelerator: Accelerator, student: Student, teacher: FrozenModel, colours: Path, micro_batches: int, implementation
) -> None:
    """GKL-AT: both sides get their gradient, the prior is uniform and then the student's own, and micro-batches give
    the gradients of the whole batch."""

    def darken(batch: Batch, targets: Targets, denominators: Denominators, step: int) -> Tensor:
        return 0.8 * student.pixels.resize(batch.image_BCHW)

    terms = (
        CLIP(over="prompts", clean=True),
        GKL(two_sided=True, class_prior=True, alpha=4, beta=20, gamma=0.4, weight_temperature=2.0),
    )
    batches = batches_of(colours, teacher, count=micro_batches)
    step = step_of(accelerator, student, teacher, colours, *terms, labels="dataset", perturb=darken)
    step.objective.implementation = implementation
    image_BCHW = torch.cat([batch.image_BCHW for batch in batches])
    labels_B = torch.cat([batch.labels_B for batch in batches])
    class_CD = class_embeddings(teacher, load_prompts(str(colours / "prompts")))
    prior_CC = torch.full((4, 4), 0.25)
    for number in range(2):
        losses = step(batches, number, measure_shares=True)
        found = gradients(student)
        pixels = student.pixels.resize(image_BCHW)
        both = [student(images) for images in (pixels, 0.8 * pixels)]
        clean_BC, attacked_BC = (similarity_logits(each.image_BD, class_CD, each.scale, None) for each in both)
        expected = two_sided_losses(clean_BC, attacked_BC, labels_B, prior_CC)
        torch.stack(list(expected.values())).sum().backward()
        assert losses.sums["loss/clip_prompts/clip"].item() == pytest.approx(expected["ce"].item(), rel=1e-5)
        for part in ("soft_ce", "wmse"):
            assert losses.sums[f"loss/gkl_prompts/{part}"].item() == pytest.approx(expected[part].item(), rel=1e-4)
        written_out = gradients(student)
        for name, gradient in written_out.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
        step.objective.priors.end_epoch()
        probability_BC = (clean_BC.detach() / 2.0).softmax(1)
        means = [probability_BC[labels_B == label].mean(0) for label in range(4)]
        prior_CC = torch.stack([mean if mean.isfinite().all() else prior_CC[0] for mean in means])


@pytest.mark.parametrize("over", ["prompts", "captions"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_at_moved_weights(
    accelerator: Accelerator, student: Student, teacher: FrozenModel, colours: Path, micro_batches: int, over: str
) -> None:
    """AWP: those of a student whose weights were moved by hand along their gradient; then all is as before."""
    batches = batches_of(colours, teacher, count=micro_batches)
    plain = step_of(accelerator, student, teacher, colours, KL(over=over))
    attack = WeightAttack(student, radius=0.05, from_step=3)
    step = step_of(accelerator, student, teacher, colours, KL(over=over), weight_attack=attack)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    plain(batches, 3, measure_shares=False)
    direction = gradients(student)
    step(batches, 2, measure_shares=False)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, direction[name])

    step(batches, 3, measure_shares=False)
    found = gradients(student)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            assert torch.equal(weight, before[name]), name
            if name in direction and weight.ndim > 1:
                weight += 0.05 * weight.norm() * direction[name] / direction[name].norm()
    plain(batches, 3, measure_shares=False)
    expected = gradients(student)
    assert any(not torch.allclose(expected[name], direction[name], rtol=1e-2) for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("over", ["prompts", "captions"])
def test_a_perturbation_reaches_the_student_alone(
    accelerator: Accelerator, student: Student, teacher: FrozenModel, colours: Path, micro_batches: int, over: str
) -> None:
    """The same gradients as from a student whose pixels are inverted, beside targets of the clean images."""
    seen = []

    def invert(batch: Batch, targets: Targets, denominators: Denominators, step: int) -> Tensor:
        seen.append((step, targets.teachers[0].outputs.image_BD))
        return 1 - student.pixels.resize(batch.image_BCHW)

    terms = [KL(over=over)]
    batches = batches_of(colours, teacher, count=micro_batches)
    perturbed = step_of(accelerator, student, teacher, colours, *terms, perturb=invert)
    perturbed(batches, 4, measure_shares=False)
    found = gradients(student)
    assert [step for step, _ in seen] == [4] * micro_batches
    for (_, image_BD), batch in zip(seen, batches, strict=True):
        torch.testing.assert_close(image_BD, teacher.encode_image(batch.image_BCHW))

    plain = step_of(accelerator, student, teacher, colours, *terms)
    plain(batches, 4, measure_shares=False)
    clean = gradients(student)
    resize = student.pixels.resize
    student.pixels.resize = lambda image_BCHW: 1 - resize(image_BCHW)  # type: ignore[method-assign]
    teacher_pixels = teacher.pixels  # a module of its own
    assert teacher_pixels is not student.pixels
    plain(batches, 4, measure_shares=False)
    expected = gradients(student)
    assert any(not torch.allclose(expected[name], clean[name]) for name in expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_workers_tokenise_captions_for_each_tower(
    student: Student, teacher: FrozenModel, colours: Path, tiny_model: Path
) -> None:
    assert student.text_tokenizer.same_as(teacher.text_tokenizer)
    assert load_student(str(tiny_model)).text_tokenizer.same_as(teacher.text_tokenizer)
    index = index_shards(expand_urls([str(colours / "train")]), cache_dir=None)

    def lengths(texts: Sequence[str]) -> TokenGroups:
        return TokenGroups((torch.tensor([[len(text)] for text in texts]),), torch.arange(len(texts)))

    stream = make_stream(
        index,
        batch_size=6,
        image_size=16,
        require_captions=True,
        num_workers=1,
        tokenizers=[teacher.text_tokenizer.grouped, lengths],
    )
    loader = StreamLoader(stream)
    batches = list(islice(loader, 5))
    loader.close()
    for batch in batches:
        tokens, of_lengths = batch.caption_tokens
        assert torch.equal(tokens.encode(lambda each: each), teacher.tokenize(batch.captions))
        assert of_lengths.tokens[0][:, 0].tolist() == list(map(len, batch.captions))
        assert batch.caption_ids_B is not None
        equal = [[one == other for other in batch.captions] for one in batch.captions]
        assert (batch.caption_ids_B[:, None] == batch.caption_ids_B).tolist() == equal


def test_micro_batches_of_unequal_captions_make_the_features_of_one(teacher: FrozenModel) -> None:
    short, long = ["red", "a dog"], ["a rather long caption of many words"]
    tokens = cat_tokens([teacher.tokenize(short), teacher.tokenize(long)])
    assert torch.equal(tokens, teacher.tokenize([*short, *long]))


def test_prompts_are_encoded_twice_a_step_whatever_the_number_of_micro_batches(
    accelerator: Accelerator, teacher: FrozenModel, tiny_model: Path, colours: Path
) -> None:
    torch.manual_seed(0)
    student = load_student(str(tiny_model))
    prompts = load_prompts(str(colours / "prompts"))
    term = GKL(gamma=0.5, temperature=2.0)
    step = step_of(accelerator, student, teacher, colours, term)
    step.texts = StudentTexts(student, class_tokens_CTL=class_prompt_tokens(student, prompts))
    batches = batches_of(colours, teacher, count=4)
    passes = []
    hook = student.clip.transformer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    step(batches, 0, measure_shares=False)
    hook.remove()
    assert passes == [False, True]
    found = gradients(student)

    teacher_CD = class_embeddings(teacher, prompts)
    class_CD = student.encode_prompts(class_prompt_tokens(student, prompts))
    image_BCHW = torch.cat([batch.image_BCHW for batch in batches])
    out = student(image_BCHW)
    gkl_loss(
        similarity_logits(out.image_BD, class_CD, out.scale, None),
        similarity_logits(teacher.encode_image(image_BCHW), teacher_CD, teacher.logit_scale, None),
        gamma=0.5,
        temperature=2.0,
    ).loss.backward()
    written_out = gradients(student)
    assert found.keys() == written_out.keys()
    assert any(name.startswith("clip.transformer") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, written_out[name], rtol=1e-3, atol=1e-6)
