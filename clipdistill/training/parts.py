"""The parts of a run: built from its config, restored from a checkpoint, saved into the next one."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from clipdistill.config import Config
from clipdistill.data.stream import merge_shards
from clipdistill.distill.adversary import Adversary
from clipdistill.distill.step import DistillationStep
from clipdistill.distill.stored_views import observe_stored_views
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.teachers import Teachers
from clipdistill.distill.weight_attack import WeightAttack
from clipdistill.distributed.collectives import gather_objects
from clipdistill.distributed.random_state import RandomState
from clipdistill.io.paths import expand
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import FrozenModel, Student
from clipdistill.training.build import (
    CaptionTokenizers,
    freeze_unused,
    load_student_of,
    make_decoder,
    make_objective,
    make_student_texts,
    open_prompts,
    open_stream,
)
from clipdistill.training.checkpoint import TrainingState
from clipdistill.training.ema import MovingAverage
from clipdistill.training.identity import Identity, check_same_run, describe
from clipdistill.training.metrics import Window
from clipdistill.training.optimizer import Schedule, match_layouts
from clipdistill.training.progress import Progress


class Component(Protocol):
    """A part of a run with a separate state on each rank, saved in checkpoints."""

    def state_dict(self) -> Mapping[str, Any]:
        """This rank's state: tensors and plain values."""

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore from the states of all ranks that saved; the number of ranks may have changed."""


class SharedComponent(Protocol):
    """A part of a run with tensors that are the same on all ranks and saved once."""

    def shared_state(self) -> dict[str, Tensor]:
        """The tensors; if empty, nothing is saved."""

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them."""


class RunParts:
    """Models, data, optimizer and step of a run.

    Args:
        config: of the run.
        accelerator: device and process group.
        state: the checkpoint to resume from; None: a new run.
        identity: what the run was made of so far, which must be what the config is made of; None: a new run.

    Attributes:
        identity: what the run is made of, except for its shards.
        student: the student.
        model: the student as the accelerator prepared it.
        loader: the training stream.
        progress: steps and epochs.
        total_steps: length of the run.
        schedule: learning rates.
        optimizer: as the accelerator prepared it.
        teachers: the frozen models.
        objective: the terms.
        distillation: computes the gradients of a step.
        ema: moving average of the student, or None.
        window: sums of the next record of the metrics.
        components: those with a state of this rank, by name.
        shared_components: those with a state that all ranks share, by name.

    Raises:
        InputError: the config, the models or the shards are invalid.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, state: TrainingState | None, identity: Identity | None = None
    ) -> None:
        self._config = config
        self._accelerator = accelerator
        self._device = accelerator.device
        self._encoding = {"cache": expand(config.data.cache), "device": self._device}
        prompts = open_prompts(config)
        num_classes = prompts.num_classes if prompts else 0
        frozen = [settings.load() for settings in config.teachers]
        self.student = load_student_of(config, frozen)
        self.identity = describe(config, prompts=prompts, teachers=frozen, student=self.student)
        if identity is not None:
            check_same_run(identity, self.identity, run=config.output)
        if config.train.channels_last:
            for tower in (self.student, *frozen):
                tower.use_channels_last()
        tokenizers = CaptionTokenizers.find(config, self.student, frozen, device=self._device)
        sizes = [tower.image_size for tower in (self.student, *frozen)]
        decoder = make_decoder(config, sizes)
        self.loader = open_stream(
            config, decoder, frozen, prompts=prompts, tokenizers=tokenizers.tokenizers, device=self._device
        )
        self.identity["labels"] = self.loader.class_digests()
        if identity is not None:
            self.loader.expect_shards(identity["shards"])
            check_same_run(identity, {"labels": self.identity["labels"]}, run=config.output)
        self._place_teachers(frozen)

        self.progress = Progress(config, self.loader, ranks=accelerator.num_processes)
        if state is not None:
            _restore({"progress": self.progress, "stream": self.loader}, state)
        self.total_steps = self._count_steps()
        self.schedule = Schedule(config.optimizer, total_steps=self.total_steps, step=self.progress.step)
        self.objective = make_objective(
            config,
            steps_per_epoch=self.progress.steps_per_epoch,
            num_classes=num_classes,
            class_counts=self.loader.class_counts,
            device=self._device,
        )
        self._prepare_student()
        set_seed(config.seed, device_specific=True)

        self.teachers = self._make_teachers(frozen, tokenizers, prompts)
        texts = make_student_texts(
            config, self.student, self.teachers, prompts, tokenizers, self.objective, **self._encoding
        )
        self.distillation = DistillationStep(
            accelerator=accelerator,
            model=self.model,
            student=self.student,
            teachers=self.teachers,
            objective=self.objective,
            texts=texts,
            labels=config.labels,
            perturb=self._make_adversary(texts),
            weight_attack=self._make_weight_attack(),
        )
        self.window = Window(self._device)
        self.components: dict[str, Component] = {
            "progress": self.progress,
            "stream": self.loader,
            "schedule": self.schedule,
            "priors": self.objective.priors,
            "window": self.window,
            "random": RandomState(self._device),
        }
        self.shared_components: dict[str, SharedComponent] = {"priors": self.objective.priors}
        if self.ema is not None:
            self.shared_components["ema"] = self.ema
        if state is not None:
            self._restore(state)
        if (
            self.loader.embeddings is not None
            and self.objective.priors.of_teachers
            and not self.objective.priors.complete
        ):
            observe_stored_views(
                self.objective,
                self.teachers,
                self.loader.embeddings,
                shards=self.loader.shards,
                labels=config.labels,
                class_lists=self.loader.class_lists,
                device=self._device,
            )

    @property
    def final_student(self) -> Student:
        """What is evaluated and exported: the moving average, if there is one."""
        return self.ema.average if self.ema is not None else self.student

    def whole_identity(self) -> Identity:
        """What the run is made of, with the shards that any rank has opened; the ranks call this together."""
        return self.identity | {"shards": merge_shards(gather_objects(self.loader.shards_read()))}

    def checkpoint_state(self) -> dict[str, Any]:
        """The arguments of ``CheckpointWriter.start``, except for the step."""
        model_state, optimizer_state = get_state_dict(
            self.model,
            self.optimizer.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True),
        )
        tensors: dict[str, Mapping[str, Any]] = {"student": model_state}
        tensors |= {name: each.shared_state() for name, each in self.shared_components.items()}
        return {
            "tensors": {name: state for name, state in tensors.items() if state},
            "frozen": self.student.frozen_state(),
            "optimizer": optimizer_state,
            "rank_state": {name: each.state_dict() for name, each in self.components.items()},
            "identity": self.whole_identity(),
        }

    def _restore(self, state: TrainingState) -> None:
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict={**state.tensors.get("frozen", {}), **state.tensors["student"]},
            optim_state_dict=dict(state.optimizer),
            options=StateDictOptions(full_state_dict=True),
        )
        match_layouts(self.optimizer.optimizer)
        for name, shared in self.shared_components.items():
            shared.load_shared_state(state.tensors.get(name, {}))
        restored = ("progress", "stream")
        _restore({name: each for name, each in self.components.items() if name not in restored}, state)

    def _place_teachers(self, frozen: Sequence[FrozenModel]) -> None:
        for teacher, settings in zip(frozen, self._config.teachers, strict=True):
            if self._device.type == "cuda":
                teacher.store_as_used()
            if settings.compile:
                teacher.compile_blocks()
            if settings.shard and self._accelerator.num_processes > 1:
                teacher.shard(self._device)
            teacher.to(self._device)

    def _count_steps(self) -> int:
        """Length of the run, which is stated in steps or in epochs."""
        config = self._config.train
        if config.steps is not None:
            return config.steps
        assert config.epochs is not None
        left = max(0.0, self.loader.batches_before(config.epochs) - self.loader.state_dict()["step"])
        return max(1, self.progress.step + math.floor(left / config.accumulate + 0.5))

    def _prepare_student(self) -> None:
        """Freeze what no term trains, then make the moving average, the optimizer and the synchronised model."""
        config, student = self._config, self.student
        freeze_unused(student, self.objective)
        self.ema = None if config.train.ema is None else MovingAverage(student, decay=config.train.ema)
        if config.student.compile:
            student.compile_towers()
        if self._accelerator.ddp_handler is not None:
            self._accelerator.ddp_handler.broadcast_buffers = student.has_statistics
        optimizer = config.optimizer.make(student, self._device)
        with warnings.catch_warnings():  # the newer name of the setting is unknown to the older releases
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer = self._accelerator.prepare(student, optimizer)
        if self.ema is not None:
            self.ema.average.to(self._device)

    def _make_adversary(self, texts: StudentTexts) -> Adversary | None:
        settings = self._config.adversarial
        if settings is None:
            return None
        return Adversary(
            settings,
            student=self.student,
            objective=self.objective,
            texts=texts,
            seed=self._config.seed,
            warmup_steps=round(settings.warmup_epochs * self.progress.steps_per_epoch),
            autocast=self._accelerator.autocast,
        )

    def _make_weight_attack(self) -> WeightAttack | None:
        settings = self._config.adversarial
        if settings is None or settings.weight_radius is None:
            return None
        from_step = round((settings.weight_from_epoch or 0.0) * self.progress.steps_per_epoch)
        return WeightAttack(self.student, radius=settings.weight_radius, from_step=from_step)

    def _make_teachers(
        self, frozen: Sequence[FrozenModel], tokenizers: CaptionTokenizers, prompts: PromptSet | None
    ) -> Teachers:
        """The teachers with their class embeddings; with a teacher cache they then leave the device."""
        cached = self.loader.embeddings is not None
        micro_batches = self._config.train.teacher_micro_batches
        teachers = Teachers(frozen, tokenizers=tokenizers.teachers, micro_batches=micro_batches, cached=cached)
        if prompts is not None:
            teachers.embed_classes(prompts, **self._encoding)
        if cached:
            for teacher in frozen:
                teacher.to("cpu")
        return teachers


def _restore(components: Mapping[str, Component], state: TrainingState) -> None:
    """Restore components from a checkpoint."""
    for name, component in components.items():
        component.load_state_dict([rank_state[name] for rank_state in state.rank_states])
