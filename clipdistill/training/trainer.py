"""The training loop: one process a device, Accelerate for devices and gradients, everything else in plain sight.

Shapes: N ranks, K micro-batches, B samples a micro-batch, C classes.
"""

import contextlib
import logging
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from clipdistill.config import Config, save_config, to_dict
from clipdistill.data.workers import dead_worker_message
from clipdistill.distill.step import DistillationStep
from clipdistill.distill.stored_views import observe_stored_views
from clipdistill.distill.teachers import Teachers
from clipdistill.distributed.collectives import AsyncMax, forget_host_group, gather_objects, open_host_group
from clipdistill.distributed.random_state import RandomState
from clipdistill.distributed.signals import Interruption, stopped_by
from clipdistill.distributed.watchdog import Watchdog
from clipdistill.errors import InputError, Interrupted, RunError
from clipdistill.evaluation import evaluate_sets, mean_main_metric
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.export import export_open_clip
from clipdistill.io.files import writing
from clipdistill.io.run_files import CHECKPOINTS_FOLDER, CONFIG_FILE, STUDENT_FOLDER, SUMMARY_FILE
from clipdistill.models.towers import Student
from clipdistill.training.build import (
    CaptionTokenizers,
    freeze_unused,
    load_student_of,
    make_decoder,
    make_objective,
    make_student_texts,
    open_evaluation_sets,
    open_prompts,
    open_stream,
)
from clipdistill.training.checkpoint import TrainingState, load_checkpoint, rate_checkpoint, save_checkpoint
from clipdistill.training.ema import MovingAverage
from clipdistill.training.metrics import MetricsLog, Window, choose_trackers, flatten
from clipdistill.training.optimizer import Schedule, set_learning_rate
from clipdistill.training.progress import Progress
from clipdistill.training.run_folder import RunResult, clear_leftovers, find_start, finished_run, whole_checkpoint
from clipdistill.training.sample_log import SampleLog, drop_later

log = logging.getLogger(__name__)

_SAMPLES_BEFORE_JUDGING = 1000
"""The share of bad samples is judged from this many samples on."""


class Component(Protocol):
    """A part of a run that has a state of its own on each rank, which is in the checkpoints."""

    def state_dict(self) -> Mapping[str, Any]:
        """This rank's state: tensors and plain values."""

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore from the states of all ranks that saved; their number may differ from today's."""


class SharedComponent(Protocol):
    """A part of a run with tensors that are the same on all ranks, and saved once."""

    def shared_state(self) -> dict[str, Tensor]:
        """The tensors; none: nothing is saved."""

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them."""


def train(config: Config, *, resume: str | None = None, interruption: Interruption | None = None) -> RunResult:
    """Run a config from start to end, or from a checkpoint to the end.

    Args:
        config: the run.
        resume: ``auto`` (the newest whole checkpoint of ``config.output``, or the start), a checkpoint's folder, or
            None (``config.output`` must not hold a run).
        interruption: handles signals already; None: SIGTERM and SIGINT are handled while the run lasts.

    Raises:
        InputError: whatever is wrong with the config, the models, the shards or the output folder.
        RunError: the disk is full, or another rank has died.
        FloatingPointError: a loss or gradient that is not finite; the step is named.
        Interrupted: SIGTERM or SIGINT came; the step under way was finished, and saved.
        ReportedElsewhereError: another rank reports one of these.
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
    """Open a run whose ranks watch one another; it is closed at the end of the block.

    Args:
        config: the run.
        accelerator: of ``start_processes``; it cannot be used afterwards.
        resume: as of ``train``.
        interruption: handles signals.

    Raises:
        Exception: what the block raises, or what another rank reports.
    """
    output = Path(config.output)
    existed = output.exists()
    run: Run | None = None
    watchdog: Watchdog | None = None
    failed = False
    try:
        watchdog = Watchdog(timeout=config.train.rank_timeout, progress=lambda: whole_checkpoint(output))
        run = Run(config, resume=resume, accelerator=accelerator, watchdog=watchdog, interruption=interruption)
        yield run
        watchdog.finish()
    except BaseException as error:
        with interruption.leaving():
            ending = error if watchdog is None else watchdog.resolve(_in_one_line(error, watchdog.progress))
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
            if watchdog is not None:
                watchdog.close()
            forget_host_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def start_processes(config: Config) -> Accelerator:
    """Initialise the device and the process group.

    Raises:
        InputError: a tracker that is not installed, or accumulation set by the launcher.
        RunError: the other ranks cannot be reached.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    timeout = timedelta(seconds=config.train.rank_timeout)
    trackers = choose_trackers(config.train.trackers)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else the processes of a launcher do not form a group
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
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"gradient_accumulation_steps: {accelerator.gradient_accumulation_steps} from the launcher; "
            "allowed: 1, with train.accumulate in its place"
        )
    return accelerator


class Run:
    """A run under way. ``fit`` is the loop; the rest of the class is what the loop calls, in that order."""

    def __init__(
        self,
        config: Config,
        *,
        resume: str | None = None,
        accelerator: Accelerator,
        watchdog: Watchdog,
        interruption: Interruption,
    ) -> None:
        self._other_children = set(multiprocessing.active_children())
        self.config = config
        self.output = Path(config.output)
        self.accelerator = accelerator
        self.watchdog = watchdog
        self.interruption = interruption
        self.device = accelerator.device
        self.cache = Path(config.data.cache).expanduser()
        checkpoint = self._claim_output(resume)
        state = None if checkpoint is None else load_checkpoint(checkpoint)

        prompts = open_prompts(config)
        num_classes = prompts.num_classes if prompts else 0
        self.evaluation_sets = open_evaluation_sets(config, cache=self.cache)
        frozen = [settings.load() for settings in config.teachers]
        self.student = student = load_student_of(config, frozen)
        if config.train.channels_last:
            for tower in (student, *frozen):
                tower.use_channels_last()
        tokenizers = CaptionTokenizers.find(config, student, frozen)
        sizes = [tower.image_size for tower in (student, *frozen)]
        decoder = make_decoder(config, sizes, num_classes=num_classes or None)
        self.loader = open_stream(
            config, decoder, frozen, tokenizers=tokenizers.tokenizers, pin_memory=self.device.type == "cuda"
        )
        for teacher, settings in zip(frozen, config.teachers, strict=True):
            if settings.shard and accelerator.num_processes > 1:
                teacher.shard(self.device)
            teacher.to(self.device)

        self.progress = Progress(config, self.loader, ranks=accelerator.num_processes)
        if state is not None:
            _restore({"progress": self.progress, "stream": self.loader}, state)
        self.total_steps = self._count_steps()
        self.schedule = Schedule(config.optimizer, total_steps=self.total_steps, step=self.progress.step)
        self.objective = objective = make_objective(
            config, steps_per_epoch=self.progress.steps_per_epoch, num_classes=num_classes, device=self.device
        )
        freeze_unused(student, objective)
        self.ema = None if config.train.ema is None else MovingAverage(student, decay=config.train.ema)
        if config.student.compile:
            student.clip.visual.compile()
        self.model, self.optimizer = accelerator.prepare(student, config.optimizer.make(student, self.device))
        if self.ema is not None:
            self.ema.average.to(self.device)
        set_seed(config.seed, device_specific=True)

        embeddings = self.loader.embeddings
        self.teachers = Teachers(
            frozen,
            tokenizers=tokenizers.teachers,
            micro_batches=config.train.teacher_micro_batches,
            cached=embeddings is not None,
        )
        encoding = {"cache": self.cache, "device": self.device}
        if prompts is not None:
            self.teachers.embed_classes(prompts, **encoding)
        if embeddings is not None:
            for teacher in frozen:
                teacher.to("cpu")
        self.distillation = DistillationStep(
            accelerator=accelerator,
            model=self.model,
            student=student,
            teachers=self.teachers,
            objective=objective,
            texts=make_student_texts(config, student, self.teachers, prompts, tokenizers, objective, **encoding),
            labels=config.labels,
        )
        self.window = Window(self.device)
        self.signal_votes = AsyncMax()
        self.evaluations = None if state is None else state.evaluations
        self.components: dict[str, Component] = {
            "progress": self.progress,
            "stream": self.loader,
            "schedule": self.schedule,
            "priors": objective.priors,
            "window": self.window,
            "random": RandomState(self.device),
        }
        self.shared_components: dict[str, SharedComponent] = {"priors": objective.priors}
        if self.ema is not None:
            self.shared_components["ema"] = self.ema
        if state is not None:
            self._restore_model(state)
            for name, shared in self.shared_components.items():
                shared.load_shared_state(state.tensors.get(name, {}))
            restored = (self.progress, self.loader)
            _restore({name: each for name, each in self.components.items() if each not in restored}, state)
        if embeddings is not None and objective.priors and not objective.priors.complete:
            observe_stored_views(
                objective,
                self.teachers,
                embeddings,
                shards=self.loader.shards,
                labels=config.labels,
                num_classes=num_classes,
                device=self.device,
            )
        self._open_logs()
        watchdog.progress = self.describe_progress

    def fit(self) -> None:
        """The loop: data, step, log, checkpoint, evaluation. A signal waits for the end of the step."""
        config, progress, stopwatch = self.config.train, self.progress, self.distillation.stopwatch
        if 0 < progress.step < self.total_steps and self._evaluation_is_due():
            self._evaluate()
        batches = iter(self.loader)
        self.model.train()
        with self.interruption.deferred():
            while progress.step < self.total_steps:
                last_of_window = (progress.step + 1) % config.log_every == 0 or progress.step + 1 == self.total_steps
                with stopwatch.step():
                    started = time.perf_counter()
                    with stopwatch.section("data wait"):
                        micro_batches = [next(batches) for _ in range(config.accumulate)]
                    waited = time.perf_counter() - started

                    lr = self.schedule.rate(progress.step)
                    set_learning_rate(self.optimizer, lr)
                    if progress.enter(micro_batches[0].epoch) and not self.teachers.cached:
                        self.objective.priors.end_epoch()
                    losses = self.distillation(micro_batches, progress.step, measure_shares=last_of_window)
                    with stopwatch.section("optimizer"):
                        grad_norm = self._update_weights()
                progress.step += 1
                self.evaluations = None
                samples = sum(len(batch) for batch in micro_batches)
                self.window.add(progress.step, losses.sums, grad_norm, samples=samples, waited=waited)
                if self.sample_log is not None:
                    self.sample_log.write(progress.step, micro_batches)

                stopping = self.signal_votes(self.interruption.number)
                saving = stopping or progress.step % config.save_every == 0 or progress.step == self.total_steps
                bad_data = self._too_many_bad_samples() if last_of_window else ""
                saving = saving or bool(bad_data) or self._evaluation_is_due()
                if last_of_window or saving:
                    self._stop_if_not_finite()
                if last_of_window:
                    self._log(self.window.close() | losses.gradient_shares | {"lr": lr})
                if saving:
                    self._save()
                if bad_data:
                    raise InputError(bad_data)
                if stopping := stopping or (self.signal_votes.close() if progress.step == self.total_steps else 0):
                    raise Interrupted(
                        f"{stopped_by(stopping)} after step {progress.step}; saved; --resume auto goes on"
                    )
                if self._evaluation_is_due() and progress.step < self.total_steps:
                    with self.interruption.immediate():
                        self._evaluate()

    def finish(self) -> RunResult:
        """Export and evaluate the final student."""
        folder = self.output / STUDENT_FOLDER
        with self.watchdog.first_rank_alone():
            if self.accelerator.is_main_process and not folder.exists():
                with writing("student", self.output):
                    export_open_clip(self._final_student(), folder)
        if self._evaluation_is_due():
            self._evaluate()
        result = RunResult(
            output=self.output,
            student=folder,
            steps=self.progress.step,
            evaluations=self.evaluations or [],
            skipped=_add_counts(gather_objects(self.loader.skipped)),
        )
        if self.accelerator.is_main_process:
            with writing(SUMMARY_FILE, self.output):
                result.save()
        return result

    def close(self, *, failed: bool = False) -> None:
        """Stop the workers, close the logs and, unless the run has failed, wait for the other ranks to do so."""
        self.loader.close()
        for worker in set(multiprocessing.active_children()) - self._other_children:  # that do not end by themselves
            worker.kill()
        self.metrics.close()
        if self.sample_log is not None:
            self.sample_log.close()
        if failed and self.accelerator.num_processes > 1:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()

    def describe_progress(self) -> str:
        """The last step, and the checkpoint to resume from."""
        return f"last finished step {self.progress.step}; {whole_checkpoint(self.output)}"

    # The step.

    def _update_weights(self) -> Tensor:
        """Let the optimizer take the step; returns the norm of the gradients before clipping."""
        max_norm = self.config.optimizer.clip_norm or math.inf
        grad_norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.cap_logit_scale()
        if self.ema is not None:
            self.ema.update(self.student, self.progress.step)
        return grad_norm

    def _stop_if_not_finite(self) -> None:
        bad_step = min(gather_objects(self.window.first_bad_step()))
        if bad_step < math.inf:
            raise FloatingPointError(
                f"step {int(bad_step)}: the loss or its gradient is not finite; the checkpoints before it are whole "
                "(lower optimizer.lr, raise optimizer.warmup_steps, or set optimizer.clip_norm)"
            )

    def _too_many_bad_samples(self) -> str:
        """The message, if more than the allowed share of all ranks' samples was bad; else empty."""
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
            f"data.max_bad_share = {allowed:g}, or raise it; saved after step {self.progress.step}, "
            "--resume auto goes on"
        )

    # Logs.

    def _open_logs(self) -> None:
        """Open the run's folder and its logs; what a killed run wrote beyond the checkpoint is dropped."""
        config, step = self.config, self.progress.step
        main = self.accelerator.is_main_process
        with self.watchdog.first_rank_alone():
            if main:
                with writing(CONFIG_FILE, self.output):
                    self.output.mkdir(parents=True, exist_ok=True)
                    clear_leftovers(self.output, finished=step == self.total_steps)
                    save_config(config, self.output / CONFIG_FILE)
                drop_later(self.output, step)
        self.metrics = MetricsLog(
            self.output,
            main=main,
            first_step=step,
            total_steps=self.total_steps,
            evaluate_first=self.evaluations is None,
        )
        self.sample_log = SampleLog(self.output) if config.train.trace else None
        if self.accelerator.log_with:
            self.accelerator.init_trackers("clipdistill", flatten(to_dict(config)))

    def _log(self, record: dict[str, Any]) -> None:
        scale = self.student.clip.logit_scale.exp().item()
        record |= {"epoch": self.progress.epoch, "logit_scale": scale}
        skipped = _add_counts(gather_objects(self.loader.skipped))
        record |= {f"skipped/{reason}": count for reason, count in skipped.items()}
        self._write({"step": self.progress.step, **record})

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics, and send it to the trackers."""
        self.metrics.write(record)
        scalars = {key: value for key, value in record.items() if key != "step" and value is not None}
        self.accelerator.log(scalars, step=record["step"])

    # Checkpoints.

    def _claim_output(self, resume: str | None) -> Path | None:
        """The checkpoint to resume from. The first rank looks for it, and decides for all."""
        decision: Path | InputError | None = None
        with self.watchdog.first_rank_alone():
            if self.accelerator.is_main_process:
                try:
                    decision = find_start(self.config, resume)
                except InputError as error:
                    decision = error
        decision = gather_objects(decision)[0]
        if isinstance(decision, InputError):
            raise decision
        return decision

    def _count_steps(self) -> int:
        """Length of the run, which is stated in steps or in epochs."""
        config = self.config.train
        if config.steps is not None:
            return config.steps
        assert config.epochs is not None
        left = max(0.0, self.loader.batches_before(config.epochs) - self.loader.state_dict()["step"])
        return max(1, self.progress.step + math.floor(left / config.accumulate + 0.5))

    def _save(self) -> None:
        self.metrics.sync()
        if self.sample_log is not None:
            self.sample_log.sync()
        model_state, optimizer_state = get_state_dict(
            self.model,
            self.optimizer.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        tensors: dict[str, Mapping[str, Any]] = {"student": model_state}
        tensors |= {name: each.shared_state() for name, each in self.shared_components.items()}
        path = save_checkpoint(
            self.output / CHECKPOINTS_FOLDER,
            step=self.progress.step,
            tensors={name: state for name, state in tensors.items() if state},
            optimizer=optimizer_state,
            rank_state={name: each.state_dict() for name, each in self.components.items()},
            keep=self.config.train.keep,
            keep_best=self.config.train.keep_best,
        )
        log.info("checkpoint %s", path)

    def _restore_model(self, state: TrainingState) -> None:
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=dict(state.tensors["student"]),
            optim_state_dict=dict(state.optimizer),
            options=StateDictOptions(full_state_dict=True),
        )

    # Evaluation.

    def _final_student(self) -> Student:
        """What is evaluated and exported: the moving average where there is one."""
        return self.ema.average if self.ema is not None else self.student

    def _evaluation_is_due(self) -> bool:
        step, every = self.progress.step, self.config.train.evaluate_every
        wanted = step == self.total_steps or (every is not None and step % every == 0)
        return bool(self.evaluation_sets) and wanted and self.evaluations is None

    def _evaluate(self) -> None:
        """Every set, shared out over the ranks; the step's checkpoint, written before, receives what was found."""
        config, step = self.config, self.progress.step
        found = evaluate_sets(
            self._final_student(),
            self.evaluation_sets,
            model=config.student.model,
            pretrained=str(self.output),
            batch_size=config.evaluation.batch_size,
            workers=config.evaluation.workers,
            device=self.device,
            cache=None if self.student.text_mode == "train" else self.cache,
        )
        record: dict[str, Any] = {"step": step}
        for one in found:
            record |= {f"evaluation/{one['dataset']}/{name}": value for name, value in one["metrics"].items()}
        record[MEAN] = mean_main_metric(found)
        name = config.train.best_metric
        metric = record[name]
        with self.watchdog.first_rank_alone():
            if self.accelerator.is_main_process:
                if metric is None:
                    log.warning(
                        "%s has no value at step %d: its checkpoint is not rated", config.train.best_metric, step
                    )
                self._write(record)
                rate_checkpoint(
                    self.output / CHECKPOINTS_FOLDER,
                    step,
                    evaluations=found,
                    metric=metric,
                    keep=config.train.keep,
                    keep_best=config.train.keep_best,
                )
        self.evaluations = found


def _restore(components: Mapping[str, Component], state: TrainingState) -> None:
    """Restore components from a checkpoint."""
    for name, component in components.items():
        component.load_state_dict([rank_state[name] for rank_state in state.rank_states])


def _in_one_line(error: BaseException, progress: Callable[[], str]) -> BaseException:
    """Convert an error to a one-line message that includes the last checkpoint."""
    message = dead_worker_message(error)
    if message is not None:
        error = RunError(message)
    if type(error) in (RunError, Interrupted) and "--resume" not in str(error):
        return type(error)(f"{error}; {progress()}")
    return error


def _add_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for part in counts for reason in part})
    return {reason: sum(part.get(reason, 0) for part in counts) for reason in reasons}
