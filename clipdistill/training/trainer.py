"""The training loop: one process per device, Accelerate for devices and gradients, everything else explicit.

Shapes: N ranks, K micro-batches, B samples per micro-batch, C classes.
"""

import contextlib
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
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from clipdistill.config import Config, save_config, to_dict
from clipdistill.data import Batch
from clipdistill.data.workers import dead_worker_message
from clipdistill.distributed.collectives import AsyncMax, forget_host_group, gather_objects, open_host_group, rank
from clipdistill.distributed.launcher import check_number_of_processes
from clipdistill.distributed.signals import Interruption, stopped_by
from clipdistill.distributed.watchdog import Watchdog
from clipdistill.errors import InputError, Interrupted, RunError
from clipdistill.evaluation import evaluate_sets
from clipdistill.evaluation.attack import AttackSettings
from clipdistill.evaluation.benchmark_format import named_metrics
from clipdistill.export import export_open_clip
from clipdistill.io.files import write_json, writing
from clipdistill.io.lock import LOCK_FILE, Lock
from clipdistill.io.machine import keep_freed_memory
from clipdistill.io.paths import expand
from clipdistill.io.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    IDENTITY_FILE,
    STUDENT_FOLDER,
    SUMMARY_FILE,
    checkpoint_folder,
)
from clipdistill.models.precision import use_tensor_cores, warn_of_emulation
from clipdistill.training.build import bad_shards_message, open_evaluation_sets
from clipdistill.training.checkpoint import CheckpointWriter, load_checkpoint, rate_checkpoint
from clipdistill.training.metrics import MetricsLog, choose_trackers, flatten
from clipdistill.training.optimizer import set_learning_rate
from clipdistill.training.parts import RunParts
from clipdistill.training.run_folder import (
    RunResult,
    Start,
    clear_leftovers,
    complete_checkpoint,
    find_start,
    set_aside,
)
from clipdistill.training.sample_log import SampleLog, drop_later

log = logging.getLogger(__name__)

_SAMPLES_BEFORE_JUDGING = 1000
"""The share of bad samples is checked once a run has seen this many samples."""

_SHARDS_BEFORE_JUDGING = 100
"""The share of unreadable shards is checked once a resampled stream has tried this many; earlier if it is certain."""


OnEvaluation = Callable[[int, Mapping[str, Any]], None]
"""Called after each evaluation with the step and its metrics, by their names in metrics.jsonl; what it raises ends the
run, which can be resumed."""


def train(
    config: Config,
    *,
    resume: str | None = None,
    restart: bool = False,
    interruption: Interruption | None = None,
    on_evaluation: OnEvaluation = lambda *_: None,
    keep_processes: bool = False,
) -> RunResult:
    """Run a config from start to end, or from a checkpoint to the end.

    Args:
        config: the run.
        resume: ``auto`` (the newest complete checkpoint of ``config.output``, or the start; a finished run is not run
            again), a checkpoint's folder, or None (``config.output`` must not hold a run).
        restart: start from the beginning; a run in ``config.output`` is moved into a folder ``abandoned_001`` in it.
        interruption: an active signal handler; None: SIGTERM and SIGINT are handled during the run.
        on_evaluation: see ``OnEvaluation``.
        keep_processes: leave the process group of several ranks to the run that this process starts next.

    Raises:
        InputError: the config, the models, the shards or the output folder are invalid; another process writes there;
            or the run to resume was made of something else.
        RunError: the disk is full, or another rank has died.
        FloatingPointError: a loss or gradient is not finite; the message names the step.
        Interrupted: SIGTERM or SIGINT was received; the current step was finished and saved.
        ReportedElsewhereError: another rank reports one of these.
    """
    if restart and resume is not None:
        raise InputError(f"--restart: given with --resume {resume}; allowed: one of the two")
    with contextlib.nullcontext(interruption) if interruption else Interruption() as interruption:
        accelerator = start_processes(config)
        with open_run(
            config,
            accelerator,
            resume=resume,
            restart=restart,
            interruption=interruption,
            keep_processes=keep_processes,
        ) as run:
            if run.finished is not None:
                return run.finished
            run.on_evaluation = on_evaluation
            run.fit()
            return run.finish()


@contextmanager
def open_run(
    config: Config,
    accelerator: Accelerator,
    *,
    resume: str | None = None,
    restart: bool = False,
    interruption: Interruption,
    keep_processes: bool = False,
) -> Iterator["Run"]:
    """Open a run whose ranks monitor each other; it is closed at the end of the block.

    Args:
        config: the run.
        accelerator: from ``start_processes``; it cannot be used afterwards.
        resume: as for ``train``.
        restart: as for ``train``.
        interruption: handles signals.
        keep_processes: as for ``train``.

    Raises:
        Exception: the block's exception, or the failure of another rank.
    """
    output = Path(config.output)
    start: Start | None = None
    lock: Lock | None = None
    run: Run | None = None
    watchdog: Watchdog | None = None
    failed = False
    try:
        watchdog = Watchdog(timeout=config.train.rank_timeout, progress=lambda: complete_checkpoint(output))
        start, lock = _claim_output(config, watchdog, resume=resume, restart=restart)
        run = Run(config, start, lock, accelerator=accelerator, watchdog=watchdog, interruption=interruption)
        yield run
        watchdog.finish()
    except BaseException as error:
        with interruption.leaving():
            if run is not None:
                run.checkpoints.salvage()
            ending = error if watchdog is None else watchdog.resolve(_in_one_line(error, watchdog.progress))
            new = start is not None and start.new and not (output / CHECKPOINTS_FOLDER).exists()
            if new and isinstance(ending, InputError | Interrupted):
                shutil.rmtree(output, ignore_errors=True)
        failed = True
        if ending is error:
            raise
        raise ending from error
    finally:
        with interruption.leaving():
            if run is not None:
                run.close(keep_processes=failed or keep_processes)
            if lock is not None:
                lock.release()
            if watchdog is not None:
                watchdog.close()
            forget_host_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def _claim_output(
    config: Config, watchdog: Watchdog, *, resume: str | None, restart: bool
) -> tuple[Start, Lock | None]:
    """Where the run starts, and the lock of its folder; rank 0 decides, and holds the lock, for all ranks."""
    output = Path(config.output)
    decision: Start | InputError | RunError | None = None
    lock = None
    with watchdog.first_rank_alone():
        if rank() == 0:
            try:
                if output.exists() and not output.is_dir():
                    raise InputError(f"output: {output} is a file; allowed: a folder")
                new = not output.exists()
                lock = Lock(output / LOCK_FILE, f"output: {output}")
                decision = replace(find_start(config, resume=resume, restart=restart), new=new)
            except BaseException as error:
                if lock is not None:
                    lock.release()
                if not isinstance(error, InputError | RunError):
                    raise
                decision = error
    decision = gather_objects(decision)[0]
    if isinstance(decision, InputError | RunError):
        raise decision
    assert decision is not None
    return decision, lock


def start_processes(config: Config) -> Accelerator:
    """Initialise the device and the process group.

    Raises:
        InputError: a tracker that is not installed, accumulation set by the launcher, or another number of processes
            than it was asked for.
        RunError: the other ranks cannot be reached.
    """
    check_number_of_processes()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    timeout = timedelta(seconds=config.train.rank_timeout)
    trackers = choose_trackers(config.train.trackers)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else Accelerate creates no process group on the CPU
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            log_with=trackers or None,
            project_dir=config.output,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        use_tensor_cores(accelerator.device)
        for precision in {config.train.precision, *(teacher.precision for teacher in config.teachers)}:
            warn_of_emulation(accelerator.device, precision)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            # On the CPU, where runs repeat bit for bit: else DDP would rebuild its buckets after its first step. With
            # more than two ranks, the order of summation then changes, and the step after a resume would differ from
            # the same step of an uninterrupted run.
            find_unused_parameters=accelerator.device.type == "cpu",
            gradient_as_bucket_view=True,
        )
        open_host_group(config.train.rank_timeout)
    except torch.distributed.DistError as error:
        raise RunError(f"the processes of the run could not connect: {str(error).splitlines()[0]}") from error
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"gradient_accumulation_steps: {accelerator.gradient_accumulation_steps} from the launcher; "
            "allowed: 1; set train.accumulate instead"
        )
    return accelerator


class Run:
    """An open run. ``fit`` is the loop; the methods that it calls follow in that order."""

    def __init__(
        self,
        config: Config,
        start: Start,
        lock: Lock | None,
        *,
        accelerator: Accelerator,
        watchdog: Watchdog,
        interruption: Interruption,
    ) -> None:
        self._other_children = set(multiprocessing.active_children())
        self.on_evaluation: OnEvaluation = lambda *_: None
        self.config = config
        self.output = Path(config.output)
        self.lock = lock
        self.finished = start.finished
        self.accelerator = accelerator
        self.watchdog = watchdog
        self.interruption = interruption
        self.device = accelerator.device
        self.cache = expand(config.data.cache)
        state = None if start.checkpoint is None else load_checkpoint(start.checkpoint)
        self.evaluations = None if state is None else state.evaluations
        self.evaluation_sets = open_evaluation_sets(config, cache=self.cache)
        self.parts = RunParts(config, accelerator, state, start.identity)
        self.progress, self.total_steps = self.parts.progress, self.parts.total_steps
        self.parts.loader.give_up = interruption.overdue
        self.signal_votes = AsyncMax()
        self.checkpoints = CheckpointWriter(
            self.output / CHECKPOINTS_FOLDER, keep=config.train.keep, keep_best=config.train.keep_best
        )
        self._open_logs(restart=start.restart)
        watchdog.progress = self.describe_progress

    def fit(self) -> None:
        """Run the loop: data, step, log, checkpoint, evaluation. A signal is handled at the end of the step."""
        config, parts, progress = self.config.train, self.parts, self.progress
        stopwatch = parts.distillation.stopwatch
        if 0 < progress.step < self.total_steps and self._evaluation_is_due():
            self._evaluate()
        batches = iter(parts.loader)
        parts.model.train()
        with self.interruption.deferred():
            while progress.step < self.total_steps:
                last_of_window = (progress.step + 1) % config.log_every == 0 or progress.step + 1 == self.total_steps
                with stopwatch.step():
                    started = time.perf_counter()
                    with stopwatch.section("data wait"):
                        micro_batches = self._wait_for_data(batches)
                    waited = time.perf_counter() - started

                    lr = parts.schedule.rate(progress.step)
                    set_learning_rate(parts.optimizer, lr)
                    if progress.enter(micro_batches[0].epoch):
                        parts.objective.priors.end_epoch(of_teachers=not parts.teachers.cached)
                    losses = parts.distillation(micro_batches, progress.step, measure_shares=last_of_window)
                    with stopwatch.section("optimizer"):
                        grad_norm = self._update_weights()
                progress.step += 1
                self.evaluations = None
                samples = sum(len(batch) for batch in micro_batches)
                parts.window.add(progress.step, losses.sums, grad_norm, samples=samples, waited=waited)
                if self.sample_log is not None:
                    self.sample_log.write(progress.step, micro_batches)

                stopping = self.signal_votes(self.interruption.number)
                saving = stopping or progress.step % config.save_every == 0 or progress.step == self.total_steps
                bad_data = self._bad_data() if last_of_window else ""
                saving = saving or bool(bad_data) or self._evaluation_is_due()
                if last_of_window or saving:
                    self._stop_if_not_finite()
                if last_of_window:
                    self._log(parts.window.close() | losses.gradient_shares | {"lr": lr})
                if saving:
                    self._save()
                else:
                    self.checkpoints.poll()
                if bad_data or stopping or progress.step == self.total_steps or self._evaluation_is_due():
                    self.checkpoints.finish()
                if bad_data:
                    raise InputError(bad_data)
                if stopping := stopping or (self.signal_votes.close() if progress.step == self.total_steps else 0):
                    raise Interrupted(
                        f"{stopped_by(stopping)} after step {progress.step}; saved; --resume auto continues"
                    )
                if self._evaluation_is_due() and progress.step < self.total_steps:
                    with self.interruption.immediate():
                        self._evaluate()

    def finish(self) -> RunResult:
        """Export and evaluate the final student."""
        folder = self.output / STUDENT_FOLDER
        with self.watchdog.first_rank_alone():
            if self.lock is not None:
                self.lock.check()
                with writing("student", self.output):
                    shutil.rmtree(folder, ignore_errors=True)
                    export_open_clip(self.parts.final_student, folder)
        if self._evaluation_is_due():
            self._evaluate()
        result = RunResult(
            output=self.output,
            student=folder,
            steps=self.progress.step,
            evaluations=self.evaluations or [],
            skipped=_add_counts(gather_objects(self.parts.loader.skipped)),
        )
        if self.accelerator.is_main_process:
            with writing(SUMMARY_FILE, self.output):
                result.save()
        return result

    def close(self, *, keep_processes: bool = False) -> None:
        """Stop the workers, close the logs, wait for the other ranks to do the same, and end the process group; for a
        run that has failed, or is followed by another one, without the last two."""
        self.parts.loader.close()
        for worker in set(multiprocessing.active_children()) - self._other_children:  # those that did not exit
            worker.kill()
        self.metrics.close()
        if self.sample_log is not None:
            self.sample_log.close()
        if keep_processes and self.accelerator.num_processes > 1:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()

    def describe_progress(self) -> str:
        """The last step, and the checkpoint to resume from."""
        return f"last finished step {self.progress.step}; {complete_checkpoint(self.output)}"

    # The step.

    def _wait_for_data(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step. A signal does not wait for data that may never come."""
        micro_batches: list[Batch] = []
        try:
            while len(micro_batches) < self.config.train.accumulate:
                with self.interruption.waiting():
                    micro_batches.append(next(batches))
        except RuntimeError as error:
            given_up = isinstance(error, RunError) or dead_worker_message(error) is not None  # or PyTorch was first
            if not (given_up and self.interruption.overdue()):
                raise
            step, stopped = self.progress.step, f"{stopped_by(self.interruption.number)} while waiting for data"
            alone = self.accelerator.num_processes == 1 and not micro_batches
            if step == 0 or not alone or checkpoint_folder(self.output / CHECKPOINTS_FOLDER, step).exists():
                raise Interrupted(stopped) from error
            self._save()
            self.checkpoints.finish()
            raise Interrupted(f"{stopped}, after step {step}; saved; --resume auto continues") from error
        return micro_batches

    def _update_weights(self) -> Tensor:
        """Run the optimizer; returns the norm of the gradients before clipping."""
        parts, max_norm = self.parts, self.config.optimizer.clip_norm or math.inf
        grad_norm: Tensor = self.accelerator.clip_grad_norm_(parts.model.parameters(), max_norm)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        parts.student.cap_logit_scale()
        if parts.ema is not None:
            parts.ema.update(self.progress.step)
        return grad_norm

    def _stop_if_not_finite(self) -> None:
        bad_step = min(gather_objects(self.parts.window.first_bad_step()))
        if bad_step < math.inf:
            raise FloatingPointError(
                f"step {int(bad_step)}: the loss or its gradient is not finite; earlier checkpoints are complete "
                "(lower optimizer.lr, raise optimizer.warmup_steps, or set optimizer.clip_norm)"
            )

    def _bad_data(self) -> str:
        """An error message if more than the allowed share of all ranks' samples or shards was bad, else empty."""
        loader, allowed = self.parts.loader, self.config.data.max_bad_share
        ranks = gather_objects((loader.samples, loader.skipped, loader.opened, loader.unreadable))
        skipped = _add_counts([skipped for _, skipped, _, _ in ranks])
        bad = sum(skipped.values())
        seen = bad + sum(samples for samples, _, _, _ in ranks)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        saved = f"; saved after step {self.progress.step}, --resume auto continues"

        faults = {number: fault for *_, unreadable in ranks for number, fault in unreadable.items()}
        good = {number for *_, opened, unreadable in ranks for number in opened - unreadable.keys()}
        tried = len(faults.keys() | good)
        faults = {number: fault for number, fault in faults.items() if number not in good}
        certain = len(faults) > allowed * loader.shards
        if certain or (tried >= _SHARDS_BEFORE_JUDGING and len(faults) > allowed * tried):
            return bad_shards_message(list(faults.values()), tried, allowed) + saved
        if seen < _SAMPLES_BEFORE_JUDGING or bad <= allowed * seen:
            return ""
        return (
            f"data.shards: {bad:,} of {seen:,} samples were bad, {bad / seen:.1%} ({reasons}); allowed: "
            f"data.max_bad_share = {allowed:g}, or a higher one{saved}"
        )

    # Logs.

    def _open_logs(self, *, restart: bool) -> None:
        """Open the run's folder and its logs; a killed run's records after the checkpoint are dropped."""
        config, step = self.config, self.progress.step
        main = self.accelerator.is_main_process and self.finished is None
        identity = self.parts.whole_identity()
        with self.watchdog.first_rank_alone():
            if main:
                with writing(f"{CONFIG_FILE} or {IDENTITY_FILE}", self.output):
                    if restart:
                        set_aside(self.output)
                    clear_leftovers(self.output, finished=step == self.total_steps)
                    write_json(self.output / IDENTITY_FILE, identity)
                    save_config(config, self.output / CONFIG_FILE)
                drop_later(self.output, step)
        self.metrics = MetricsLog(
            self.output,
            main=main,
            first_step=step,
            total_steps=self.total_steps,
            evaluate_first=self.evaluations is None,
        )
        self.sample_log = SampleLog(self.output) if config.train.trace and self.finished is None else None
        if self.accelerator.log_with and self.finished is None:
            self.accelerator.init_trackers("clipdistill", flatten(to_dict(config)))

    def _log(self, record: dict[str, Any]) -> None:
        scale = self.parts.student.clip.logit_scale.exp().item()
        record |= {"epoch": self.progress.epoch, "logit_scale": scale}
        skipped = _add_counts(gather_objects(self.parts.loader.skipped))
        record |= {f"skipped/{reason}": count for reason, count in skipped.items()}
        self._write({"step": self.progress.step, **record})

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics, and send it to the trackers."""
        self.metrics.write(record)
        scalars = {key: value for key, value in record.items() if key != "step" and value is not None}
        self.accelerator.log(scalars, step=record["step"])

    # Checkpoints.

    def _save(self) -> None:
        if self.lock is not None:
            self.lock.check()
        self.metrics.sync()
        if self.sample_log is not None:
            self.sample_log.sync()
        self.checkpoints.start(self.progress.step, **self.parts.checkpoint_state())

    # Evaluation.

    def _evaluation_is_due(self) -> bool:
        step, every = self.progress.step, self.config.train.evaluate_every
        wanted = step == self.total_steps or (every is not None and step % every == 0)
        return bool(self.evaluation_sets) and wanted and self.evaluations is None

    def _evaluate(self) -> None:
        """Evaluate on every set, distributed over the ranks, and add the results to the step's existing checkpoint."""
        config, step = self.config, self.progress.step
        found = evaluate_sets(
            self.parts.final_student,
            self.evaluation_sets,
            model=config.student.model,
            pretrained=str(self.output),
            batch_size=config.evaluation.batch_size,
            workers=config.evaluation.workers,
            device=self.device,
            cache=None if self.parts.student.text_mode == "train" else self.cache,
            attack=None if config.evaluation.attack is None else AttackSettings.of(config.evaluation.attack),
        )
        record: dict[str, Any] = {"step": step, **named_metrics(found)}
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
        self.on_evaluation(step, record)


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
