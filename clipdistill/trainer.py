"""The training loop: one process a device, Accelerate for devices and gradients, everything else in plain sight.

Shapes: N ranks, K micro-batches, B samples a micro-batch, C classes, T templates, L tokens, D features.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from clipdistill.checkpoint import TrainingState, load_checkpoint, resolve_resume, save_checkpoint
from clipdistill.config import Config, TermConfig, check_same_run, load_config, save_config, to_dict
from clipdistill.data import Augmentation, Batch, ImageTextStream, StreamLoader, expand_urls, index_shards
from clipdistill.distributed import gather_objects, rank, sum_over_ranks, widest_float, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation import (
    benchmark_record,
    classification_metrics,
    load_classification_set,
    mean_acc1,
    predict,
)
from clipdistill.export import export_open_clip
from clipdistill.files import write_json
from clipdistill.metrics import MetricsLog, choose_trackers, flatten
from clipdistill.objective import Features, Objective, Targets, Term
from clipdistill.prompts import PromptSet, load_prompts
from clipdistill.similarity import class_prompt_tokens, prompt_bank
from clipdistill.towers import Student, Teacher, load_student, load_teacher, share_of_classes

log = logging.getLogger(__name__)

_OF_SAMPLES = ("image", "captions")
"""Those of the student's outputs that have a row a sample; the others are the same for every micro-batch."""

SUMMARY_FILE = "summary.json"
"""Written when a run has ended: steps, skipped samples, evaluations of the final student."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        output: the run's folder.
        student: the exported student's folder.
        steps: optimizer steps taken in all.
        evaluations: one CLIP_benchmark record a set, of the final student.
        skipped: bad samples by reason.
    """

    output: Path
    student: Path
    steps: int
    evaluations: list[dict[str, Any]]
    skipped: Mapping[str, int]


def train(config: Config, *, resume: str | None = None) -> RunResult:
    """Run a config from start to end, or from a checkpoint to the end.

    Args:
        config: the run.
        resume: ``auto`` (the newest valid checkpoint of ``config.output``, or the start), a checkpoint's folder, or
            None (``config.output`` must not hold a run).

    Raises:
        InputError: whatever is wrong with the config, the models, the shards or the output folder.
        FloatingPointError: a loss or gradient that is not finite; the step is named.
    """
    output = Path(config.output)
    finished = _finished(config) if resume == "auto" else None
    if finished is not None:
        return finished
    existed = output.exists()
    run = None
    try:
        run = Run(config, resume=resume)
        run.fit()
        return run.finish()
    except InputError:
        if not existed and not (output / "checkpoints").exists():
            shutil.rmtree(output, ignore_errors=True)
        raise
    finally:
        if run is not None:
            run.close()
        AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A run under way. ``fit`` is the loop; the rest of the class is what the loop calls, in that order."""

    def __init__(self, config: Config, *, resume: str | None = None) -> None:
        output = Path(config.output)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        trackers = choose_trackers(config.train.trackers)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            log_with=trackers or None,
            project_dir=str(output),
        )
        if self.accelerator.gradient_accumulation_steps != 1:
            raise InputError(
                f"gradient_accumulation_steps: {self.accelerator.gradient_accumulation_steps} from the launcher; "
                "allowed: 1, with train.accumulate in its place"
            )
        checkpoint = _claim_output(config, resume)
        self.config = config
        self.output = output
        self.device = self.accelerator.device
        self.cache = Path(config.data.cache).expanduser()

        terms = [term for term in config.objective if term.weight > 0]
        self.prompts = load_prompts(config.prompts) if config.prompts else None
        if self.prompts is not None and self.prompts.num_classes < 2:
            raise InputError(f"prompts: {config.prompts} has 1 class; allowed: 2 or more")
        self.evaluation_sets = [
            load_classification_set(
                folder,
                split=config.evaluation.split,
                allow_duplicates=config.evaluation.allow_duplicate_classes,
            )
            for folder in config.evaluation.folders
        ]
        self.teachers = self._load_teachers()
        student = self._load_student()
        _check_dimensions(terms, self.teachers, student)
        for teacher, settings in zip(self.teachers, config.teachers, strict=True):
            if settings.shard and self.accelerator.num_processes > 1:
                teacher.shard(self.device)
            teacher.to(self.device)
        self.image_size = config.data.image_size or max(t.image_size for t in (student, *self.teachers))

        self.loader = self._open_stream()
        steps_per_epoch = self.loader.steps_per_epoch / config.train.accumulate
        if config.train.steps is not None:
            self.total_steps = config.train.steps
        else:
            assert config.train.epochs is not None
            self.total_steps = max(1, round(config.train.epochs * steps_per_epoch))
        self.objective = Objective(
            [_term(term, steps_per_epoch) for term in terms],
            teacher_weights=[teacher.weight for teacher in self.teachers],
            num_classes=self.prompts.num_classes if self.prompts else 0,
            device=self.device,
        )
        _freeze_unused(student, self.objective)
        self.student = student
        self.ema = None if config.train.ema is None else MovingAverage(student, decay=config.train.ema)
        optimizer = torch.optim.AdamW(
            parameter_groups(student, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            fused=self.device.type == "cuda" or None,
        )
        if config.student.compile:
            student.clip.visual.compile()
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
        if self.ema is not None:
            self.ema.average.to(self.device)
        set_seed(config.seed, device_specific=True)

        self.teacher_banks = self._teacher_banks()
        self.student_bank_CD, self.prompt_tokens_CTL = self._student_prompts()
        self.step = 0
        if checkpoint is not None:
            self._restore(load_checkpoint(checkpoint))
        main = self.accelerator.is_main_process
        if main:
            output.mkdir(parents=True, exist_ok=True)
            save_config(config, output / "config.yaml")
        self.metrics = MetricsLog(output, main=main, first_step=self.step, total_steps=self.total_steps)
        if trackers:
            self.accelerator.init_trackers("clipdistill", flatten(to_dict(config)))
        self.evaluations: list[dict[str, Any]] = []

    def fit(self) -> None:
        """The loop: data, step, log, checkpoint, evaluation."""
        config = self.config.train
        batches = iter(self.loader)
        self.model.train()
        window = _Window(self.device)
        while self.step < self.total_steps:
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(config.accumulate)]
            waited = time.perf_counter() - started

            lr = self._set_learning_rate()
            epoch = self._epoch_of(self.step)
            if self.step > 0 and epoch != self._epoch_of(self.step - 1):
                self.objective.end_epoch()
            last_of_window = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.total_steps
            losses, shares, grad_norm = self._optimize(micro_batches, measure_shares=last_of_window)
            self.step += 1
            window.add(self.step, losses, grad_norm, sum(len(batch) for batch in micro_batches), waited)

            saving = self.step % config.save_every == 0 or self.step == self.total_steps
            if last_of_window or saving:
                self._stop_if_not_finite(window)
            if last_of_window:
                record = window.close() | shares
                self._log(
                    record | {"lr": lr, "epoch": epoch, "logit_scale": self.student.clip.logit_scale.exp().item()}
                )
            if saving:
                self._save()
            if config.evaluate_every and self.step % config.evaluate_every == 0 and self.step < self.total_steps:
                self._evaluate()

    def finish(self) -> RunResult:
        """Export and evaluate the final student."""
        folder = self.output / "student"
        if self.accelerator.is_main_process and not folder.exists():
            export_open_clip(self._tower(), folder)
        self.accelerator.wait_for_everyone()
        self._evaluate()
        skipped = _add_counts(gather_objects(self.loader.skipped))
        if self.accelerator.is_main_process:
            summary = {"steps": self.step, "skipped": skipped, "evaluations": self.evaluations}
            write_json(self.output / SUMMARY_FILE, summary)
        return RunResult(
            output=self.output,
            student=folder,
            steps=self.step,
            evaluations=self.evaluations,
            skipped=skipped,
        )

    def close(self) -> None:
        """Stop the workers, and close the logs."""
        self.loader.close()
        self.metrics.close()
        self.accelerator.end_training()

    # The step.

    def _optimize(
        self, batches: Sequence[Batch], *, measure_shares: bool
    ) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
        """One optimizer step over K micro-batches: unweighted losses (this rank's share), shares, gradient norm."""
        batches = [batch.to(self.device) for batch in batches]
        targets = [self._targets(batch) for batch in batches]
        for target in targets:
            self.objective.observe(target)
        rows = sum(len(batch) for batch in batches)
        if len(batches) == 1 or self.objective.separable:
            denominators = self.objective.denominators(targets, rows)
            losses, shares = self._backward_apart(batches, targets, denominators, measure_shares)
        else:
            whole = _concatenate(targets)
            denominators = self.objective.denominators([whole], rows)
            losses, shares = self._backward_together(batches, whole, denominators, measure_shares)
        grad_norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.clip_norm or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.cap_logit_scale()
        if self.ema is not None:
            self.ema.update(self.student, self.step)
        return losses, shares, grad_norm

    def _backward_apart(
        self,
        batches: Sequence[Batch],
        targets: Sequence[Targets],
        denominators: Mapping[str, Tensor],
        measure_shares: bool,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients of rows that need not see each other: forward and backward, one micro-batch after another."""
        sums: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        for number, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            last = number == len(batches) - 1
            with _synchronised(self.accelerator, self.model, last):
                student = self._features(self.model(batch.image_BCHW, **self._texts(batch)), target)
                losses = self.objective.losses(student, target, denominators)
                if measure_shares and last:
                    shares = self._gradient_shares(losses, student.image_BD)
                total = self.objective.total(losses, self.step)
                self.accelerator.backward(total * self.accelerator.num_processes)
            _accumulate(sums, losses, total)
        return sums, shares

    def _backward_together(
        self,
        batches: Sequence[Batch],
        target: Targets,
        denominators: Mapping[str, Tensor],
        measure_shares: bool,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients of rows that see each other across micro-batches (in-batch terms).

        All features are computed once without gradient; the loss of the whole gives each feature its gradient; a
        second forward pass a micro-batch carries it to the weights (Gao et al. 2021, arXiv 2101.06983). Random states
        and buffers are put back before the second pass, so that both passes see the same network.
        """
        buffers = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        states, outputs = [], []
        with torch.no_grad():
            for number, batch in enumerate(batches):
                states.append(_random_state(self.device))
                texts = self._texts(batch, prompts=number == len(batches) - 1)
                outputs.append(self.model(batch.image_BCHW, **texts))
        leaves = {
            key: torch.cat([out[key] for out in outputs]).requires_grad_()
            if key in _OF_SAMPLES
            else outputs[-1][key].detach().requires_grad_()
            for key in outputs[-1]
        }
        student = self._features(leaves, target)
        losses = self.objective.losses(student, target, denominators)
        shares = self._gradient_shares(losses, student.image_BD) if measure_shares else {}
        total = self.objective.total(losses, self.step)
        (total * self.accelerator.num_processes).backward()

        with torch.no_grad():
            for name, buffer in self.student.named_buffers():
                buffer.copy_(buffers[name])
        starts = torch.tensor([0, *(len(batch) for batch in batches)]).cumsum(0).tolist()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            _set_random_state(states[number], self.device)
            with _synchronised(self.accelerator, self.model, last):
                out = self.model(batch.image_BCHW, **self._texts(batch, prompts=last))
                rows = slice(starts[number], starts[number + 1])
                carried = [
                    (value * leaf.grad[rows] if key in _OF_SAMPLES else value * leaf.grad).sum()
                    for key, value in out.items()
                    if (leaf := leaves[key]).grad is not None and (last or key in _OF_SAMPLES)
                ]
                self.accelerator.backward(torch.stack(carried).sum())
        sums: dict[str, Tensor] = {}
        _accumulate(sums, losses, total)
        return sums, shares

    def _gradient_shares(self, losses: Mapping[str, Mapping[str, Tensor]], image_BD: Tensor) -> dict[str, float]:
        """Each part's share of the gradient norms at this rank's image features of the student, weights applied."""
        norms = {}
        for term in self.objective.terms:
            for part, value in losses[term.name].items():
                weighted = term.weight_at(self.step) * value
                (grad,) = torch.autograd.grad(weighted, image_BD, retain_graph=True, allow_unused=True)
                norms[f"gradient_share/{term.name}/{part}"] = 0.0 if grad is None else float(grad.norm())
        total = sum(norms.values())
        return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}

    def _targets(self, batch: Batch) -> Targets:
        """What the teachers say of a micro-batch, and its labels."""
        teachers = []
        lends_captions = self.student.text_mode == "teacher" and self.objective.needs_captions
        if self.objective.needs_teachers or self.config.labels == "teacher" or lends_captions:
            for teacher, bank_CD in zip(self.teachers, self.teacher_banks, strict=True):
                captions_BD = None
                if self.objective.needs_teacher_captions or lends_captions:
                    captions_BD = teacher.encode_tokens(teacher.tokenize(batch.captions).to(self.device))
                teachers.append(
                    Features(
                        image_BD=teacher.encode_image(batch.image_BCHW),
                        scale=teacher.logit_scale,
                        prompts_CD=bank_CD,
                        captions_BD=captions_BD,
                        bias=teacher.bias,
                    )
                )
        labels_B = None
        if self.config.labels == "dataset":
            labels_B = batch.labels_B
        elif self.config.labels == "teacher":
            labels_B = teachers[0].prompt_logits.argmax(dim=1)
        caption_ids_B = _caption_ids(batch.captions, self.device) if self.objective.needs_captions else None
        return Targets(teachers=teachers, labels_B=labels_B, caption_ids_B=caption_ids_B)

    def _texts(self, batch: Batch, *, prompts: bool = True) -> dict[str, Any]:
        """The student's text inputs for a micro-batch, as its text mode asks."""
        texts: dict[str, Any] = {}
        if prompts and self.prompt_tokens_CTL is not None:
            tokens = self._templates_of_step(self.prompt_tokens_CTL)
            texts["prompt_tokens_NL"] = share_of_classes(tokens).to(self.device)
            texts["num_classes"] = len(tokens)
        if self.objective.needs_captions and self.student.text_mode != "teacher":
            texts["caption_tokens_BL"] = self.student.tokenize(batch.captions).to(self.device)
        return texts

    def _templates_of_step(self, tokens_CTL: Tensor) -> Tensor:
        """This step's templates: (C, L) for one, (C, t, L) for several; drawn from (seed, step)."""
        wanted = self.config.templates_per_step or tokens_CTL.shape[1]
        if wanted < tokens_CTL.shape[1]:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
            tokens_CTL = tokens_CTL[:, torch.randperm(tokens_CTL.shape[1], generator=generator)[:wanted]]
            tokens_CTL = self.student.trim(tokens_CTL)
        return tokens_CTL[:, 0] if tokens_CTL.shape[1] == 1 else tokens_CTL

    def _features(self, out: Mapping[str, Tensor], target: Targets) -> Features:
        captions_BD = out.get("captions")
        if self.student.text_mode == "teacher" and self.objective.needs_captions:
            captions_BD = target.teachers[0].captions_BD
        return Features(
            image_BD=out["image"],
            scale=out["scale"],
            prompts_CD=out.get("prompts", self.student_bank_CD),
            captions_BD=captions_BD,
            bias=out.get("bias"),
        )

    def _epoch_of(self, step: int) -> int:
        """The epoch, from 0, to which the first sample of an optimizer step belongs."""
        return step * self.config.train.accumulate // self.loader.steps_per_epoch

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then a cosine that would reach 0 one step after the last."""
        settings = self.config.optimizer
        if self.step < settings.warmup_steps:
            factor = (self.step + 1) / settings.warmup_steps
        else:
            progress = (self.step - settings.warmup_steps) / max(1, self.total_steps - settings.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        return settings.lr * factor

    # Logs, checkpoints, evaluation.

    def _stop_if_not_finite(self, window: "_Window") -> None:
        bad_step = min(gather_objects(window.first_bad_step()))
        if bad_step < math.inf:
            raise FloatingPointError(
                f"step {int(bad_step)}: the loss or its gradient is not finite; the checkpoints before it are whole "
                "(lower optimizer.lr, raise optimizer.warmup_steps, or set optimizer.clip_norm)"
            )

    def _log(self, record: dict[str, Any]) -> None:
        skipped = _add_counts(gather_objects(self.loader.skipped))
        record |= {f"skipped/{reason}": count for reason, count in skipped.items()}
        record = {"step": self.step, **record}
        self.metrics.write(record)
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=self.step)

    def _save(self) -> None:
        model_state, optimizer_state = get_state_dict(
            self.model,
            self.optimizer.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        tensors: dict[str, Any] = {"student": model_state}
        if self.ema is not None:
            tensors["ema"] = self.ema.average.state_dict()
        priors = {
            f"{name}/{part}": getattr(prior, part)
            for name, prior in self.objective.priors.items()
            for part in ("prior_CC", "count_C", "sum_CC")
        }
        rank_state = {
            "stream": self.loader.state_dict(),
            "random": _random_state(self.device),
            "priors": {name: tensor.cpu() for name, tensor in priors.items()},
        }
        state = TrainingState(step=self.step, tensors=tensors, optimizer=optimizer_state, rank_state=rank_state)
        path = save_checkpoint(self.output / "checkpoints", state, keep=self.config.train.keep)
        log.info("checkpoint %s", path)

    def _restore(self, state: TrainingState) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=dict(state.tensors["student"]),
            optim_state_dict=dict(state.optimizer),
            options=options,
        )
        if self.ema is not None:
            self.ema.average.load_state_dict(dict(state.tensors["ema"]))
        for name, tensor in state.rank_state["priors"].items():
            prior, part = name.rsplit("/", 1)
            setattr(self.objective.priors[prior], part, tensor.to(self.device))
        self.loader.load_state_dict(state.rank_state["stream"])
        _set_random_state(state.rank_state["random"], self.device)
        self.step = state.step

    def _tower(self) -> Student:
        """What is evaluated and exported: the moving average where there is one."""
        return self.ema.average if self.ema is not None else self.student

    def _evaluate(self) -> None:
        """Zero-shot accuracy on every set, by the main process; the others wait."""
        if self.accelerator.is_main_process and self.evaluation_sets:
            self.evaluations = []
            record: dict[str, Any] = {"step": self.step}
            for data in self.evaluation_sets:
                predictions = predict(
                    self._tower(),
                    data,
                    batch_size=self.config.evaluation.batch_size,
                    workers=self.config.evaluation.workers,
                    device=self.device,
                )
                metrics = classification_metrics(predictions)
                self.evaluations.append(
                    benchmark_record(data, metrics, model=self.config.student.model, pretrained=str(self.output))
                )
                record |= {f"evaluation/{data.name}/{name}": value for name, value in metrics.items()}
            record["evaluation/mean_acc1"] = mean_acc1(self.evaluations)
            self.metrics.write(record)
            self.accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=self.step)
        self.accelerator.wait_for_everyone()

    # The parts.

    def _load_teachers(self) -> list[Teacher]:
        settings = [asdict(teacher) for teacher in self.config.teachers]
        return [
            load_teacher(
                teacher["model"],
                pretrained=teacher["pretrained"],
                weight=teacher["weight"],
                logit_scale=teacher["logit_scale"],
                precision=teacher["precision"],
            )
            for teacher in settings
        ]

    def _load_student(self) -> Student:
        settings = self.config.student
        set_seed(self.config.seed)
        student = load_student(
            settings.model,
            pretrained=settings.pretrained,
            text_mode=settings.text,
            teacher=self.teachers[0] if settings.text == "teacher" else None,
            logit_scale=settings.logit_scale,
            train_logit_scale=settings.train_logit_scale,
        )
        if settings.grad_checkpointing:
            student.clip.set_grad_checkpointing(True)
        if self.config.train.channels_last:
            for tower in (student, *self.teachers):
                tower.use_channels_last()
        return student

    def _open_stream(self) -> StreamLoader:
        data = self.config.data
        urls = expand_urls(data.shards)
        accelerator = self.accelerator
        mine = index_shards(urls[accelerator.process_index :: accelerator.num_processes], cache_dir=self.cache)
        parts = gather_objects(mine)
        index = [parts[number % len(parts)][number // len(parts)] for number in range(len(urls))]
        augmentation = Augmentation(
            **{name: tuple(v) if isinstance(v, list) else v for name, v in asdict(data.augmentation).items()}  # type: ignore[arg-type]
        )
        needs_captions = any(term.over == "captions" and term.weight > 0 for term in self.config.objective)
        stream = ImageTextStream(
            index,
            batch_size=data.batch_size,
            image_size=self.image_size,
            augmentation=augmentation,
            seed=self.config.seed,
            shuffle=data.shuffle,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=data.workers,
            caption_key=data.caption_key,
            label_key=data.label_key,
            require_captions=needs_captions,
            require_labels=self.config.labels == "dataset",
            num_classes=self.prompts.num_classes if self.prompts and self.config.labels == "dataset" else None,
            max_pixels=data.max_pixels,
        )
        return StreamLoader(stream, pin_memory=self.device.type == "cuda")

    def _teacher_banks(self) -> list[Tensor | None]:
        if self.prompts is None:
            return [None for _ in self.teachers]
        return [self._bank(teacher, self.prompts) for teacher in self.teachers]

    def _bank(self, tower: Teacher | Student, prompts: PromptSet) -> Tensor:
        return prompt_bank(tower, prompts, cache=self.cache, device=self.device)

    def _student_prompts(self) -> tuple[Tensor | None, Tensor | None]:
        """The student's class features where they are fixed, its class tokens where they are trained."""
        if self.prompts is None or not self.objective.needs_prompts:
            return None, None
        if self.student.text_mode == "teacher":
            return self.teacher_banks[0], None
        if self.student.text_mode == "freeze":
            return self._bank(self.student, self.prompts), None
        return None, class_prompt_tokens(self.student, self.prompts)


class _Window:
    """Sums over the steps between two records of the metrics, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad_step = torch.tensor(math.inf, dtype=widest_float(device), device=device)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.samples = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, samples: int, waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["grad_norm"] = self.sums.get("grad_norm", 0.0) + grad_norm.detach() / world_size()
        finite = torch.isfinite(losses["loss"]) & torch.isfinite(grad_norm)
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step))
        self.steps += 1
        self.samples += samples
        self.waited += waited

    def first_bad_step(self) -> float:
        return float(self.bad_step)

    def close(self) -> dict[str, float]:
        """Means over the window and over ranks, throughput of all ranks, share of the time spent waiting for data."""
        values = torch.stack([value.to(widest_float(self.device)) for value in self.sums.values()])
        seconds = time.perf_counter() - self.started
        record = dict(zip(self.sums, (sum_over_ranks(values) / self.steps).tolist(), strict=True))
        record["samples_per_second"] = self.samples * world_size() / seconds
        record["data_wait_share"] = sum(gather_objects(self.waited)) / world_size() / seconds
        self._reset()
        return record


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: decayed are matrices and convolutions; not vectors and scales (of whatever number of
    dimensions), positions, class tokens, the logit scale.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            position = name.endswith(("positional_embedding", "pos_embed", "class_embedding", "cls_token"))
            vector = sum(size > 1 for size in parameter.shape) < 2
            (free if vector or position else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _finished(config: Config) -> RunResult | None:
    """What a run left, if it has ended; its config must be this one."""
    output = Path(config.output)
    if not (output / SUMMARY_FILE).is_file():
        return None
    check_same_run(load_config(output / "config.yaml"), config)
    summary = json.loads((output / SUMMARY_FILE).read_text(encoding="utf-8"))
    return RunResult(
        output=output,
        student=output / "student",
        steps=summary["steps"],
        evaluations=summary["evaluations"],
        skipped=summary["skipped"],
    )


def _claim_output(config: Config, resume: str | None) -> Path | None:
    """Refuse a folder that holds another run; the checkpoint to resume from. The first rank decides for all."""
    decision: Path | str | None = None
    if rank() == 0:
        try:
            decision = _find_start(config, resume)
        except InputError as error:
            decision = str(error)
    decision = gather_objects(decision)[0]
    if isinstance(decision, str):
        raise InputError(decision)
    return decision


def _find_start(config: Config, resume: str | None) -> Path | None:
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; allowed: a folder")
    taken = output.is_dir() and any(output.iterdir())
    if taken and resume is None:
        raise InputError(f"output: {output} holds another run; allowed: a new folder, or --resume auto to go on")
    if taken and not (output / "config.yaml").is_file():
        raise InputError(f"output: {output} holds other files; allowed: a new folder, or the folder of this run")
    if resume is None:
        return None
    checkpoint = resolve_resume(resume, output / "checkpoints")
    started = output if checkpoint is None else checkpoint.parent.parent
    if (started / "config.yaml").is_file():
        check_same_run(load_config(started / "config.yaml"), config)
    return checkpoint


def _check_dimensions(terms: Sequence[TermConfig], teachers: Sequence[Teacher], student: Student) -> None:
    for term in terms:
        for teacher in teachers:
            if term.loss == "feature" and teacher.embed_dim != student.embed_dim:
                raise InputError(
                    f"objective.loss: feature compares the student's {student.embed_dim} dimensions with the "
                    f"{teacher.embed_dim} of teacher {teacher.name}; allowed: equal ones (as student.text: teacher)"
                )


def _term(config: TermConfig, steps_per_epoch: float) -> Term:
    settings = asdict(config)
    warmup_steps = round(settings.pop("warmup_epochs") * steps_per_epoch)
    return Term(name=config.name, warmup_steps=warmup_steps, **settings)


def _freeze_unused(student: Student, objective: Objective) -> None:
    """Parameters that no term reaches would break DDP's synchronisation."""
    if not objective.needs_logits:
        student.clip.logit_scale.requires_grad_(False)
        bias = student.logit_bias()
        if bias is not None:
            bias.requires_grad_(False)
    if not (objective.needs_prompts or objective.needs_captions):
        student.freeze_text()


class MovingAverage:
    """An exponential moving average of a student's weights and of its buffers, such as batch-norm statistics.

    It starts fast: the decay of update n, from 0, is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, student: Student, *, decay: float) -> None:
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: Student, number: int) -> None:
        """Take in the weights after optimizer step ``number``."""
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        pairs = list(zip(self.average.state_dict().values(), student.state_dict().values(), strict=True))
        floating = [(mean, current) for mean, current in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floating], [current for _, current in floating], share)
        for mean, current in pairs:
            if not mean.is_floating_point():
                mean.copy_(current)


def _concatenate(targets: Sequence[Targets]) -> Targets:
    """The targets of several micro-batches as those of one batch."""

    def join(parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    teachers = [
        replace(
            same[0],
            image_BD=torch.cat([part.image_BD for part in same]),
            captions_BD=join([part.captions_BD for part in same]),
        )
        for same in zip(*(target.teachers for target in targets), strict=True)
    ]
    return Targets(
        teachers=teachers,
        labels_B=join([target.labels_B for target in targets]),
        caption_ids_B=join([target.caption_ids_B for target in targets]),
    )


def _accumulate(sums: dict[str, Tensor], losses: Mapping[str, Mapping[str, Tensor]], total: Tensor) -> None:
    sums["loss"] = sums.get("loss", 0.0) + total.detach()
    for term, parts in losses.items():
        for part, value in parts.items():
            name = f"loss/{term}/{part}"
            sums[name] = sums.get(name, 0.0) + value.detach()


def _synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Exchange gradients in the backward pass of the last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def _caption_ids(captions: Sequence[str], device: torch.device) -> Tensor:
    """A 63-bit number for each caption, equal for equal captions on every rank."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], device=device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _add_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for part in counts for reason in part})
    return {reason: sum(part.get(reason, 0) for part in counts) for reason in reasons}
