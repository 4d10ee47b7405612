"""The training loop: one process a device, Accelerate for devices and gradients, everything else in plain sight.

Shapes: N ranks, K micro-batches, B samples a micro-batch, C classes, T templates, L tokens, D features.
"""

import contextlib
import hashlib
import logging
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from clipdistill.config import Config, save_config, to_dict
from clipdistill.data import Batch
from clipdistill.data.embeddings import EmbeddingReader, Embeddings
from clipdistill.data.workers import told_of_worker
from clipdistill.distill.objective import Features, Objective, Targets, TermLoss
from clipdistill.distributed.collectives import Vote, forget_host_group, gather_objects, open_host_group
from clipdistill.distributed.signals import Interruption, stopped_by
from clipdistill.distributed.watchdog import Peers
from clipdistill.errors import InputError, Interrupted, RunError
from clipdistill.evaluation import evaluate_sets, mean_main_metric
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.export import export_open_clip
from clipdistill.io.files import writing
from clipdistill.io.run_files import CHECKPOINTS_FOLDER, CONFIG_FILE, STUDENT_FOLDER, SUMMARY_FILE
from clipdistill.models.class_embeddings import class_prompt_tokens, prompt_bank
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import Student, Teacher, share_of_classes
from clipdistill.training.build import (
    freeze_unused,
    make_optimizer,
    make_terms,
    open_evaluation_sets,
    open_prompts,
    open_stream,
    open_student,
    open_teachers,
)
from clipdistill.training.checkpoint import (
    TrainingState,
    load_checkpoint,
    own_part,
    random_state,
    rate_checkpoint,
    save_checkpoint,
    set_random_state,
)
from clipdistill.training.ema import MovingAverage
from clipdistill.training.metrics import MetricsLog, Window, choose_trackers, flatten
from clipdistill.training.optimizer import Schedule
from clipdistill.training.run_folder import (
    RunResult,
    clear_leftovers,
    find_start,
    finished_run,
    whole_checkpoint,
)
from clipdistill.training.sample_log import Trace, drop_later
from clipdistill.training.stopwatch import NoStopwatch

log = logging.getLogger(__name__)

_OF_SAMPLES = ("image", "captions")
"""Those of the student's outputs that have a row a sample; the others are the same for every micro-batch."""

_ROWS_OBSERVED = 4096
"""Stored views whose predictions are added to the class priors at once."""

_SAMPLES_BEFORE_JUDGING = 1000
"""Before so many samples, the share of bad ones says nothing."""


def train(config: Config, *, resume: str | None = None, interruption: Interruption | None = None) -> RunResult:
    """Run a config from start to end, or from a checkpoint to the end.

    Args:
        config: the run.
        resume: ``auto`` (the newest whole checkpoint of ``config.output``, or the start), a checkpoint's folder, or
            None (``config.output`` must not hold a run).
        interruption: handles signals already; None: SIGTERM and SIGINT are handled while the run lasts.

    Raises:
        InputError: whatever is wrong with the config, the models, the shards or the output folder.
        RunError: the disk is full, or another process of the run is gone.
        FloatingPointError: a loss or gradient that is not finite; the step is named.
        Interrupted: SIGTERM or SIGINT came; the step under way was finished, and saved.
        AlreadyToldError: another process of the run ends with one of these.
    """
    finished = finished_run(config) if resume == "auto" else None
    if finished is not None:
        return finished
    with contextlib.nullcontext(interruption) if interruption else Interruption() as interruption:
        accelerator = start_processes(config)
        with open_run(config, accelerator, resume=resume, interruption=interruption) as run:
            run.fit()
            return run.finish()


@contextmanager
def open_run(
    config: Config, accelerator: Accelerator, *, resume: str | None = None, interruption: Interruption
) -> Iterator["Run"]:
    """A run whose processes watch one another; at the end of the block it is closed, and the processes are apart.

    Args:
        config: the run.
        accelerator: of ``start_processes``; it is of no use afterwards.
        resume: as of ``train``.
        interruption: handles signals.

    Raises:
        Exception: what the block raises, or what another process says of it.
    """
    output = Path(config.output)
    existed = output.exists()
    run: Run | None = None
    peers: Peers | None = None
    failed = False
    try:
        peers = Peers(timeout=config.train.rank_timeout, progress=lambda: whole_checkpoint(output))
        run = Run(config, resume=resume, accelerator=accelerator, peers=peers, interruption=interruption)
        yield run
        peers.part()
    except BaseException as error:
        with interruption.leaving():
            ending = error if peers is None else peers.account_for(_in_one_line(error, peers.progress))
            new = not existed and not (output / CHECKPOINTS_FOLDER).exists()
            if new and isinstance(ending, InputError | Interrupted):
                shutil.rmtree(output, ignore_errors=True)
        failed = True
        if ending is error:
            raise
        raise ending from error
    finally:
        with interruption.leaving():
            if run is not None:
                run.close(failed=failed)
            if peers is not None:
                peers.close()
            forget_host_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def start_processes(config: Config) -> Accelerator:
    """Find the device, and the other processes of the run.

    Raises:
        InputError: a tracker that is not there.
        RunError: the other processes do not come.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    timeout = timedelta(seconds=config.train.rank_timeout)
    trackers = choose_trackers(config.train.trackers)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else each process of a launcher believes to be alone
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            log_with=trackers or None,
            project_dir=config.output,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        if accelerator.device.type == "cpu":
            # DDP would lay its buckets out anew after its first step. Sums of more than two ranks then add up in
            # another order, and the step after a resume would differ from the same step of a run that went through.
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        open_host_group(config.train.rank_timeout)
    except torch.distributed.DistError as error:
        raise RunError(f"the processes of the run have not found each other: {str(error).splitlines()[0]}") from error
    return accelerator


class Run:
    """A run under way. ``fit`` is the loop; the rest of the class is what the loop calls, in that order."""

    def __init__(
        self,
        config: Config,
        *,
        resume: str | None = None,
        accelerator: Accelerator | None = None,
        peers: Peers | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self._other_children = set(multiprocessing.active_children())
        self.config = config
        self.output = output = Path(config.output)
        self.accelerator = accelerator or start_processes(config)
        if self.accelerator.gradient_accumulation_steps != 1:
            raise InputError(
                f"gradient_accumulation_steps: {self.accelerator.gradient_accumulation_steps} from the launcher; "
                "allowed: 1, with train.accumulate in its place"
            )
        self.peers = peers or Peers(timeout=config.train.rank_timeout)
        self.interruption = interruption or Interruption()
        checkpoint = self._claim_output(resume)
        self.device = self.accelerator.device
        self.cache = Path(config.data.cache).expanduser()

        self.prompts = open_prompts(config)
        self.evaluation_sets = open_evaluation_sets(config, cache=self.cache)
        self.teachers = open_teachers(config)
        student = open_student(config, self.teachers)
        self.loader = open_stream(
            config,
            student,
            self.teachers,
            num_classes=self.prompts.num_classes if self.prompts else None,
            pin_memory=self.device.type == "cuda",
        )
        self.embeddings = self.loader.embeddings
        for teacher, settings in zip(self.teachers, config.teachers, strict=True):
            if settings.shard and self.accelerator.num_processes > 1:
                teacher.shard(self.device)
            teacher.to(self.device)
        self.step = self.epoch = 0
        state = None if checkpoint is None else load_checkpoint(checkpoint)
        self.steps_per_epoch = self.loader.steps_per_epoch / config.train.accumulate
        if state is not None:
            self._find_place(state)
        self.schedule = self._make_schedule(state)
        self.total_steps = self.schedule.total_steps
        self.objective = Objective(
            make_terms(config, self.steps_per_epoch),
            teacher_weights=[teacher.weight for teacher in self.teachers],
            num_classes=self.prompts.num_classes if self.prompts else 0,
            device=self.device,
            implementation=config.train.loss_implementation,  # type: ignore[arg-type]
        )
        freeze_unused(student, self.objective)
        self.student = student
        self.ema = None if config.train.ema is None else MovingAverage(student, decay=config.train.ema)
        if config.student.compile:
            student.clip.visual.compile()
        self.model, self.optimizer = self.accelerator.prepare(student, make_optimizer(config, student, self.device))
        if self.ema is not None:
            self.ema.average.to(self.device)
        set_seed(config.seed, device_specific=True)

        self.teacher_banks = self._teacher_banks()
        if self.embeddings is not None:
            for teacher in self.teachers:
                teacher.to("cpu")
        self.student_bank_CD, self.prompt_tokens_CTL = self._student_prompts()
        self.window = Window(self.device)
        self.stopwatch = NoStopwatch()
        self.vote = Vote()
        self.evaluations: list[dict[str, Any]] | None = None
        self.prior_of_cache = False
        if state is not None:
            self._restore(state)
        if self.embeddings is not None and self.objective.priors and not self.prior_of_cache:
            self._observe_all(self.embeddings)
            self.prior_of_cache = True
        main = self.accelerator.is_main_process
        with self.peers.first_alone():
            if main:
                with writing(CONFIG_FILE, output):
                    output.mkdir(parents=True, exist_ok=True)
                    clear_leftovers(output, finished=self.step == self.total_steps)
                    save_config(config, output / CONFIG_FILE)
                drop_later(output, self.step)
        self.metrics = MetricsLog(
            output,
            main=main,
            first_step=self.step,
            total_steps=self.total_steps,
            evaluate_first=self.evaluations is None,
        )
        self.trace = Trace(output) if config.train.trace else None
        if self.accelerator.log_with:
            self.accelerator.init_trackers("clipdistill", flatten(to_dict(config)))
        self.peers.progress = self.progress

    def fit(self) -> None:
        """The loop: data, step, log, checkpoint, evaluation. A signal waits for the end of the step."""
        config = self.config.train
        if 0 < self.step < self.total_steps and self._evaluation_is_due():
            self._evaluate()
        batches = iter(self.loader)
        self.model.train()
        with self.interruption.deferred():
            while self.step < self.total_steps:
                last_of_window = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.total_steps
                with self.stopwatch.step():
                    started = time.perf_counter()
                    with self.stopwatch.section("data wait"):
                        micro_batches = [next(batches) for _ in range(config.accumulate)]
                    waited = time.perf_counter() - started

                    lr = self._set_learning_rate()
                    if micro_batches[0].epoch != self.epoch:
                        self.epoch = micro_batches[0].epoch
                        if self.embeddings is None:
                            self.objective.end_epoch()
                    losses, shares, grad_norm = self._optimize(micro_batches, measure_shares=last_of_window)
                self.step += 1
                self.evaluations = None
                samples = sum(len(batch) for batch in micro_batches)
                self.window.add(self.step, losses, grad_norm, samples=samples, waited=waited)
                if self.trace is not None:
                    self.trace.write(self.step, micro_batches)

                stopping = self.vote(self.interruption.number)
                saving = stopping or self.step % config.save_every == 0 or self.step == self.total_steps
                bad_data = self._too_many_bad_samples() if last_of_window else ""
                saving = saving or bool(bad_data) or self._evaluation_is_due()
                if last_of_window or saving:
                    self._stop_if_not_finite()
                if last_of_window:
                    scale = self.student.clip.logit_scale.exp().item()
                    self._log(self.window.close() | shares | {"lr": lr, "epoch": self.epoch, "logit_scale": scale})
                if saving:
                    self._save()
                if bad_data:
                    raise InputError(bad_data)
                if stopping := stopping or (self.vote.close() if self.step == self.total_steps else 0):
                    raise Interrupted(f"{stopped_by(stopping)} after step {self.step}; saved; --resume auto goes on")
                if self._evaluation_is_due() and self.step < self.total_steps:
                    with self.interruption.immediate():
                        self._evaluate()

    def finish(self) -> RunResult:
        """Export and evaluate the final student."""
        folder = self.output / STUDENT_FOLDER
        with self.peers.first_alone():
            if self.accelerator.is_main_process and not folder.exists():
                with writing("student", self.output):
                    export_open_clip(self._tower(), folder)
        if self._evaluation_is_due():
            self._evaluate()
        result = RunResult(
            output=self.output,
            student=folder,
            steps=self.step,
            evaluations=self.evaluations or [],
            skipped=_add_counts(gather_objects(self.loader.skipped)),
        )
        if self.accelerator.is_main_process:
            with writing(SUMMARY_FILE, self.output):
                result.save()
        return result

    def close(self, *, failed: bool = False) -> None:
        """Stop the workers, close the logs, and take leave of the other processes, unless they are not to be met."""
        self.loader.close()
        for worker in set(multiprocessing.active_children()) - self._other_children:  # that do not end by themselves
            worker.kill()
        self.metrics.close()
        if self.trace is not None:
            self.trace.close()
        if failed and self.accelerator.num_processes > 1:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()

    def progress(self) -> str:
        """How far the run has come, and what the next one will find."""
        return f"last finished step {self.step}; {whole_checkpoint(self.output)}"

    # The step.

    def _optimize(
        self, batches: Sequence[Batch], *, measure_shares: bool
    ) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
        """One optimizer step over K micro-batches: unweighted losses (this rank's share), shares, gradient norm."""
        batches = [batch.to(self.device) for batch in batches]
        with self.stopwatch.section("teacher"):
            targets = [self._targets(batch, said) for batch, said in zip(batches, self._ask(batches), strict=True)]
            if self.embeddings is None:
                for target in targets:
                    self.objective.observe(target)
        rows = sum(len(batch) for batch in batches)
        if len(batches) == 1 or self.objective.separable:
            with self.stopwatch.section("loss"):
                denominators = self.objective.denominators(targets, rows)
            losses, shares = self._backward_apart(batches, targets, denominators, measure_shares)
        else:
            whole = _concatenate(targets)
            with self.stopwatch.section("loss"):
                denominators = self.objective.denominators([whole], rows)
            losses, shares = self._backward_together(batches, whole, denominators, measure_shares)
        with self.stopwatch.section("optimizer"):
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
                with self.stopwatch.section("student forward"):
                    student = self._features(self.model(batch.image_BCHW, **self._texts(batch)), target)
                with self.stopwatch.section("loss"):
                    losses = self.objective.losses(student, target, denominators)
                    if measure_shares and last:
                        shares = self._gradient_shares(losses, student.image_BD)
                    total = self.objective.total(losses, self.step)
                with self.stopwatch.section("backward"):
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
        with torch.no_grad(), self.stopwatch.section("student forward"):
            for number, batch in enumerate(batches):
                states.append(random_state(self.device))
                texts = self._texts(batch, prompts=number == len(batches) - 1)
                outputs.append(self.model(batch.image_BCHW, **texts))
        leaves = {
            key: torch.cat([out[key] for out in outputs]).requires_grad_()
            if key in _OF_SAMPLES
            else outputs[-1][key].detach().requires_grad_()
            for key in outputs[-1]
        }
        student = self._features(leaves, target)
        with self.stopwatch.section("loss"):
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
            set_random_state(states[number], self.device)
            with _synchronised(self.accelerator, self.model, last):
                with self.stopwatch.section("student forward"):
                    out = self.model(batch.image_BCHW, **self._texts(batch, prompts=last))
                rows = slice(starts[number], starts[number + 1])
                carried = [
                    (value * leaf.grad[rows] if key in _OF_SAMPLES else value * leaf.grad).sum()
                    for key, value in out.items()
                    if (leaf := leaves[key]).grad is not None and (last or key in _OF_SAMPLES)
                ]
                with self.stopwatch.section("backward"):
                    self.accelerator.backward(torch.stack(carried).sum())
        sums: dict[str, Tensor] = {}
        _accumulate(sums, losses, total)
        return sums, shares

    def _gradient_shares(self, losses: Mapping[str, TermLoss], image_BD: Tensor) -> dict[str, float]:
        """Each part's share of the gradient norms at this rank's image features of the student, weights applied."""
        norms = {}
        for term in self.objective.terms:
            for part, value in losses[term.name].parts.items():
                weighted = term.weight_at(self.step) * value
                (grad,) = torch.autograd.grad(weighted, image_BD, retain_graph=True, allow_unused=True)
                norms[f"gradient_share/{term.name}/{part}"] = 0.0 if grad is None else float(grad.norm())
        total = sum(norms.values())
        return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}

    def _observe_all(self, embeddings: EmbeddingReader) -> None:
        """The class priors over all stored views, in one pass over this rank's shards."""
        for shard in range(self.accelerator.process_index, self.loader.shards, self.accelerator.num_processes):
            images, labels = embeddings.everything(shard)
            if self.config.labels == "dataset":
                images, labels = [image[labels >= 0] for image in images], labels[labels >= 0]
                if len(labels) and int(labels.max()) >= self.objective.num_classes:
                    raise InputError(
                        f"data.shards: label {int(labels.max())} in shard number {shard}; allowed: 0 to "
                        f"{self.objective.num_classes - 1} (there are {self.objective.num_classes} class names)"
                    )
            for start in range(0, len(labels), _ROWS_OBSERVED):
                rows = slice(start, start + _ROWS_OBSERVED)
                teachers = [self._said(number, image[rows].to(self.device)) for number, image in enumerate(images)]
                labels_B = labels[rows].to(self.device)
                if self.config.labels == "teacher":
                    labels_B = teachers[0].prompt_logits.argmax(dim=1)
                self.objective.observe(Targets(teachers=teachers, labels_B=labels_B))
        self.objective.end_epoch()

    def _said(self, number: int, image_BD: Tensor, captions_BD: Tensor | None = None) -> Features:
        """Embeddings of a teacher with what belongs to them."""
        teacher = self.teachers[number]
        return Features(
            image_BD=image_BD,
            scale=teacher.logit_scale,
            prompts_CD=self.teacher_banks[number],
            captions_BD=captions_BD,
            bias=teacher.bias,
        )

    def _ask(self, batches: Sequence[Batch]) -> list[list[Embeddings]]:
        """What each teacher says of each micro-batch: as it is stored, or by running it, on several at once."""
        lends_captions = self.student.text_mode == "teacher" and self.objective.needs_captions
        if not (self.objective.needs_teachers or self.config.labels == "teacher" or lends_captions):
            return [[] for _ in batches]
        if self.embeddings is not None:
            return [batch.teachers for batch in batches]
        wants_captions = self.objective.needs_teacher_captions or lends_captions
        said: list[list[Embeddings]] = []
        at_once = self.config.train.teacher_micro_batches
        for start in range(0, len(batches), at_once):
            group = batches[start : start + at_once]
            rows = [len(batch) for batch in group]
            image_BCHW = torch.cat([batch.image_BCHW for batch in group]) if len(group) > 1 else group[0].image_BCHW
            captions = [caption for batch in group for caption in batch.captions] if wants_captions else None
            answers = [_run_teacher(teacher, image_BCHW, captions).split(rows) for teacher in self.teachers]
            said += [list(of_batch) for of_batch in zip(*answers, strict=True)]
        return said

    def _targets(self, batch: Batch, said: Sequence[Embeddings]) -> Targets:
        """What the teachers say of a micro-batch, and its labels."""
        teachers = [self._said(number, each.image_BD, each.captions_BD) for number, each in enumerate(said)]
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

    def _set_learning_rate(self) -> float:
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    # Logs, checkpoints, evaluation.

    def _stop_if_not_finite(self) -> None:
        bad_step = min(gather_objects(self.window.first_bad_step()))
        if bad_step < math.inf:
            raise FloatingPointError(
                f"step {int(bad_step)}: the loss or its gradient is not finite; the checkpoints before it are whole "
                "(lower optimizer.lr, raise optimizer.warmup_steps, or set optimizer.clip_norm)"
            )

    def _too_many_bad_samples(self) -> str:
        """What to say if more than the allowed share of all ranks' samples were bad; else nothing."""
        counts = gather_objects((self.loader.samples, self.loader.skipped))
        skipped = _add_counts([skipped for _, skipped in counts])
        bad = sum(skipped.values())
        seen = bad + sum(samples for samples, _ in counts)
        allowed = self.config.data.max_bad_share
        if seen < _SAMPLES_BEFORE_JUDGING or bad <= allowed * seen:
            return ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        return (
            f"data.shards: {bad:,} of {seen:,} samples were bad, {bad / seen:.1%} ({reasons}); allowed: "
            f"data.max_bad_share = {allowed:g}, or raise it; saved after step {self.step}, --resume auto goes on"
        )

    def _log(self, record: dict[str, Any]) -> None:
        skipped = _add_counts(gather_objects(self.loader.skipped))
        record |= {f"skipped/{reason}": count for reason, count in skipped.items()}
        record = {"step": self.step, **record}
        self.metrics.write(record)
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=self.step)

    def _save(self) -> None:
        self.metrics.sync()
        if self.trace is not None:
            self.trace.sync()
        model_state, optimizer_state = get_state_dict(
            self.model,
            self.optimizer.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        tensors: dict[str, Any] = {"student": model_state}
        if self.ema is not None:
            tensors["ema"] = self.ema.average.state_dict()
        priors = self.objective.priors
        if priors:
            tensors["priors"] = {name: prior.prior_CC for name, prior in priors.items()}
        config = self.config.train
        path = save_checkpoint(
            self.output / CHECKPOINTS_FOLDER,
            step=self.step,
            tensors=tensors,
            optimizer=optimizer_state,
            rank_state={
                "run": {
                    "epoch": self.epoch,
                    "steps_per_epoch": self.steps_per_epoch,
                    "schedule": self.schedule.state_dict(),
                    "batch": self._batch(),
                    "prior_of_cache": self.prior_of_cache,
                },
                "stream": self.loader.state_dict(),
                "random": random_state(self.device),
                "window": self.window.state_dict(),
                "prior_sums": {name: prior.sum_CC.cpu() for name, prior in priors.items()},
                "prior_counts": {name: prior.count_C.cpu() for name, prior in priors.items()},
            },
            keep=config.keep,
            keep_best=config.keep_best,
        )
        log.info("checkpoint %s", path)

    def _batch(self) -> dict[str, int]:
        """What the global batch is made up of."""
        accumulate, batch_size = self.config.train.accumulate, self.config.data.batch_size
        return {"ranks": self.accelerator.num_processes, "accumulate": accumulate, "batch_size": batch_size}

    def _find_place(self, state: TrainingState) -> None:
        """Go to where the run stands in its epochs: the part of ``_restore`` on which the length of the run depends."""
        run = state.rank_states[0]["run"]
        before, now = run["batch"], self._batch()
        was, size = math.prod(before.values()), math.prod(now.values())
        if was != size:
            for name, key in {"accumulate": "train.accumulate", "batch_size": "data.batch_size"}.items():
                if before[name] != now[name]:
                    raise InputError(
                        f"{key}: {now[name]}, but the run has {before[name]}; allowed: the same, or one that keeps the "
                        f"global batch of {was} samples with {now['ranks']} processes"
                    )
            log.warning("the global batch was %d samples with %d processes, and is %d", was, before["ranks"], size)
        self.step, self.epoch, self.steps_per_epoch = state.step, run["epoch"], run["steps_per_epoch"]
        self.loader.load_state_dicts([rank_state["stream"] for rank_state in state.rank_states])

    def _make_schedule(self, state: TrainingState | None) -> Schedule:
        """The learning rates up to the end of the run, which is stated in steps or in epochs."""
        config, optimizer = self.config.train, self.config.optimizer
        if config.steps is not None:
            total_steps = config.steps
        else:
            assert config.epochs is not None
            left = self.loader.batches_before(config.epochs) - self.loader.state_dict()["step"]
            total_steps = max(1, self.step + math.floor(max(0.0, left) / config.accumulate + 0.5))
        schedule = Schedule(
            peak=optimizer.lr,
            warmup_steps=optimizer.warmup_steps,
            total_steps=total_steps,
            anchor_step=optimizer.warmup_steps,
        )
        return schedule if state is None else schedule.resumed(state.rank_states[0]["run"]["schedule"], self.step)

    def _restore(self, state: TrainingState) -> None:
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=dict(state.tensors["student"]),
            optim_state_dict=dict(state.optimizer),
            options=StateDictOptions(full_state_dict=True),
        )
        if self.ema is not None:
            self.ema.average.load_state_dict(dict(state.tensors["ema"]))
        ranks, mine = state.rank_states, self.accelerator.process_index
        for name, prior in self.objective.priors.items():
            prior.prior_CC = state.tensors["priors"][name].to(self.device, copy=True)
            prior.sum_CC = own_part([rank["prior_sums"][name] for rank in ranks]).to(self.device)
            prior.count_C = own_part([rank["prior_counts"][name] for rank in ranks]).to(self.device)
        windows = [rank["window"] for rank in ranks]
        sums = {name: own_part([window["sums"][name] for window in windows]) for name in windows[0]["sums"]}
        self.window.load_state_dict({"steps": windows[0]["steps"], "sums": sums})
        if mine < len(ranks):
            set_random_state(ranks[mine]["random"], self.device)
        self.prior_of_cache = ranks[0]["run"]["prior_of_cache"]
        self.evaluations = state.evaluations

    def _tower(self) -> Student:
        """What is evaluated and exported: the moving average where there is one."""
        return self.ema.average if self.ema is not None else self.student

    def _evaluation_is_due(self) -> bool:
        every = self.config.train.evaluate_every
        wanted = self.step == self.total_steps or (every is not None and self.step % every == 0)
        return bool(self.evaluation_sets) and wanted and self.evaluations is None

    def _evaluate(self) -> None:
        """Every set, shared out over the ranks; the step's checkpoint, written before, receives what was found."""
        found = evaluate_sets(
            self._tower(),
            self.evaluation_sets,
            model=self.config.student.model,
            pretrained=str(self.output),
            batch_size=self.config.evaluation.batch_size,
            workers=self.config.evaluation.workers,
            device=self.device,
            cache=None if self.student.text_mode == "train" else self.cache,
        )
        record: dict[str, Any] = {"step": self.step}
        for one in found:
            record |= {f"evaluation/{one['dataset']}/{name}": value for name, value in one["metrics"].items()}
        record[MEAN] = mean_main_metric(found)
        with self.peers.first_alone():
            if self.accelerator.is_main_process:
                self.metrics.write(record)
                self.accelerator.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=self.step)
                rate_checkpoint(
                    self.output / CHECKPOINTS_FOLDER,
                    self.step,
                    evaluations=found,
                    metric=record[self.config.train.best_metric] or 0.0,
                    keep=self.config.train.keep,
                    keep_best=self.config.train.keep_best,
                )
        self.evaluations = found

    # The parts.

    def _claim_output(self, resume: str | None) -> Path | None:
        """The checkpoint to resume from. The first process looks for it, and decides for all."""
        decision: Path | InputError | None = None
        with self.peers.first_alone():
            if self.accelerator.is_main_process:
                try:
                    decision = find_start(self.config, resume)
                except InputError as error:
                    decision = error
        decision = gather_objects(decision)[0]
        if isinstance(decision, InputError):
            raise decision
        return decision

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


def _run_teacher(teacher: Teacher, image_BCHW: Tensor, captions: Sequence[str] | None) -> Embeddings:
    """Run a teacher."""
    captions_BD = None
    if captions is not None:
        captions_BD = teacher.encode_tokens(teacher.tokenize(captions).to(image_BCHW.device))
    return Embeddings(image_BD=teacher.encode_image(image_BCHW), captions_BD=captions_BD)


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


def _accumulate(sums: dict[str, Tensor], losses: Mapping[str, TermLoss], total: Tensor) -> None:
    sums["loss"] = sums.get("loss", 0.0) + total.detach()
    for term, loss in losses.items():
        for part, value in loss.parts.items():
            name = f"loss/{term}/{part}"
            sums[name] = sums.get(name, 0.0) + value.detach()


def _synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Exchange gradients in the backward pass of the last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def _caption_ids(captions: Sequence[str], device: torch.device) -> Tensor:
    """A 63-bit number for each caption, equal for equal captions on every rank."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], device=device)


def _in_one_line(error: BaseException, progress: Callable[[], str]) -> BaseException:
    """An error that is not the program's own, with a line that says, too, what is left of the run."""
    gone = told_of_worker(error)
    if gone is not None:
        error = RunError(gone)
    if type(error) in (RunError, Interrupted) and "--resume" not in str(error):
        return type(error)(f"{error}; {progress()}")
    return error


def _add_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for part in counts for reason in part})
    return {reason: sum(part.get(reason, 0) for part in counts) for reason in reasons}
