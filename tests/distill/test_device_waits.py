"""A training step queues its work on the device, and waits for nothing: no value of it is read on the host, and no
tensor of the host is used in it, except for the batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from clipdistill.data import Batch, StreamLoader, expand_urls, index_shards
from clipdistill.distill.objective import Objective
from clipdistill.distill.step import DistillationStep
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.teachers import Teachers
from clipdistill.losses import LOSSES, Loss
from clipdistill.models.class_embeddings import class_prompt_tokens
from clipdistill.models.loading import load_frozen_model, load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.settings import union_of, validate
from clipdistill.training.ema import MovingAverage
from clipdistill.training.metrics import Window
from clipdistill.training.optimizer import AdamW
from tests.streams import make_stream
from tests.traps import DEVICE, HostDeviceTrap

TERMS = [
    {"loss": "gkl"},
    {"loss": "gkl", "gamma": 0.5},
    {"loss": "gkl", "class_prior": True},
    {"loss": "gkl", "over": "captions"},
    {"loss": "kl"},
    {"loss": "kl", "over": "captions"},
    {"loss": "dkd"},
    {"loss": "dist"},
    {"loss": "clip", "over": "captions"},
    {"loss": "feature"},
    {"loss": "icl"},
]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = DEVICE
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on meta
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def term_of(values: dict[str, Any]) -> Loss:
    return validate(union_of(LOSSES, "loss"), values)


def test_every_loss_is_tried() -> None:
    assert {values["loss"] for values in TERMS} == {loss.model_fields["loss"].default for loss in LOSSES}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("values", TERMS, ids=str)
def test_a_step_waits_for_nothing(
    accelerator: Accelerator,
    teacher_folder: Path,
    tiny_model: Path,
    colours: Path,
    values: dict[str, Any],
    micro_batches: int,
) -> None:
    term = term_of(values)
    prompts = load_prompts(str(colours / "prompts"))
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    student = load_student(str(tiny_model))
    teachers = Teachers([teacher], tokenizers=[0])
    teachers.embed_classes(prompts)
    for model in (teacher, student):
        model.to(DEVICE)
    teachers.class_embeddings = [class_CD.to(DEVICE) for class_CD in teachers.class_embeddings]
    texts = StudentTexts(
        student, class_tokens_CTL=class_prompt_tokens(student, prompts), templates_per_step=1, caption_tokens=0
    )
    objective = Objective([term], teacher_weights=[1.0], num_classes=prompts.num_classes, device=DEVICE)
    average = MovingAverage(student, decay=0.99)
    window = Window(DEVICE)
    optimizer = AdamW().make(student, DEVICE)
    step = DistillationStep(
        accelerator=accelerator,
        model=student,
        student=student,
        teachers=teachers,
        objective=objective,
        texts=texts,
        labels="teacher" if term.needs_labels else "none",
    )

    def run(number: int) -> None:
        batches = [batch.to(DEVICE) for batch in islice(loader, micro_batches)]
        with HostDeviceTrap() as trap:
            losses = step(batches, number, measure_shares=False)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            student.cap_logit_scale()
            average.update(number)
            window.add(number, losses.sums, norm, samples=1, waited=0.0)
            objective.priors.end_epoch()
        assert not trap.found

    with_batches = make_stream(
        index_shards(expand_urls([str(colours / "train")]), cache_dir=None),
        batch_size=6,
        image_size=16,
        require_captions=True,
        tokenizers=[teacher.text_tokenizer.grouped],
    )
    loader: Iterator[Batch] = iter(StreamLoader(with_batches))
    for number in range(2):
        run(number)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x_BC: x_BC.sum().item(),
        lambda x_BC: x_BC.cpu(),
        lambda x_BC: x_BC[x_BC > 0],
        lambda x_BC: x_BC[torch.tensor([0, 1])],
        lambda x_BC: x_BC + torch.ones(3).to(DEVICE),
        lambda x_BC: x_BC + torch.tensor([1.0, 2.0, 3.0], device=DEVICE),
        lambda x_BC: x_BC.copy_(torch.ones(2, 3)),
    ],
)
def test_the_trap_finds_waits(wait: Any) -> None:
    x_BC = torch.ones(2, 3, device=DEVICE)
    with HostDeviceTrap() as trap:
        try:
            wait(x_BC)
        except (RuntimeError, NotImplementedError):
            return
    assert trap.found


def test_the_trap_lets_work_on_the_device_pass() -> None:
    x_BC = torch.ones(2, 3, device=DEVICE)
    with HostDeviceTrap() as trap:
        (x_BC * torch.tensor(2.0) + torch.full((3,), 4.0, device=DEVICE)).softmax(-1).sum()
    assert not trap.found
