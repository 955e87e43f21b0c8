"""The training loop: steps, log lines, validation, checkpoints, and the ways to stop."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_peft.checkpoint.folders import best_checkpoint
from megatron_peft.checkpoint.save import SaveOutcome, Saver
from megatron_peft.checkpoint.state import TrainingState, whole_parameters
from megatron_peft.config import CheckpointConfig, config_to_dict
from megatron_peft.data.batches import GlobalBatches
from megatron_peft.data.build import Data
from megatron_peft.parallel.collectives import from_first_rank
from megatron_peft.runtime.exit_signals import ExitSignals
from megatron_peft.runtime.failure import written_after
from megatron_peft.runtime.launch import gather_over_world, shorten_timeout
from megatron_peft.training import step
from megatron_peft.training.metrics import MetricsWriter, memory_bytes
from megatron_peft.training.terminal import Progress
from megatron_peft.training.update import mixed_layers, mixtures
from megatron_peft.training.watchers import Interval, Record, Watchers, watched_steps

AfterStep = Callable[[TrainingState, bool], str]  # the state, and whether this was the last step


def train(
    state: TrainingState,
    data: Data,
    saver: Saver,
    planned_peak: Callable[[], int | str | None] | None = None,
    after_step: AfterStep | None = None,
) -> str:
    """Train from `state.position` to the end of the run, or until a signal or limit stops it.

    data: of which the training steps are set to the state's position.
    planned_peak: bytes of this rank's planned peak, once it is known, or why it cannot be; printed beside the measured.
    after_step: called on every rank after each step, after the last one once it is saved, if the run was not asked to
        stop; its time does not count, and what it returns is printed.
    Returns why it ended, a sentence for the terminal.
    Raises CheckpointNotSaved: on every rank, if the last checkpoint could not be written. Earlier failures only warn.
    Raises ConfigurationError: on every rank, at a save: --save was moved away, and another run has that folder now.
    """
    run = _Run(state, data, saver, planned_peak, after_step)
    with run.signals, run.writer, run.progress, watched_steps(state) as run.watchers:
        return run.to_the_end()


class _Run:
    watchers: Watchers

    def __init__(
        self,
        state: TrainingState,
        data: Data,
        saver: Saver,
        planned_peak: Callable[[], int | str | None] | None,
        after_step: AfterStep | None,
    ) -> None:
        self.state, self.data, self.saver, self.planned_peak = state, data, saver, planned_peak
        self.after_step = after_step
        config, is_writer = state.config, dist.get_rank() == 0
        self.started_from = self.saved_iteration = start = state.position.iteration
        folder, settings = config.checkpoint.save, config_to_dict(config)
        self.writer = MetricsWriter(folder, config.logging, is_writer, start, settings, saver.hold_folder)
        self.progress = Progress(data.train_iters, start, enabled=is_writer)
        self.signals = ExitSignals(config.training.exit_signal_handler, is_writer)
        self.mixed_layers = mixed_layers(state)
        self.measured_peak: int | None = None
        self.started_at = time.monotonic()

    def to_the_end(self) -> str:
        position = self.state.position
        steps = iter(self.data.train)
        first, reason = position.iteration, self._interrupted_validation() or self._nothing_to_do()
        while not reason and position.iteration < self.data.train_iters:
            with self.watchers.own_work.of_host():
                microbatches = next(steps)
            reason = self._one_iteration(microbatches)
        steps.close()  # type: ignore[attr-defined]
        # Save before the test loss, so that a failure there loses nothing.
        self._save_the_end()
        if position.iteration > first and reason != self._asked_to_stop():  # it may be killed soon
            self._after_step(is_last=True)
        if self.data.test is not None and (position.iteration >= self.data.train_iters or self._ends_early()):
            try:
                loss = f"{self._loss_on(self.data.test, 'test'):.6E}"
            except step.ValidationInterrupted:
                loss = "not measured, since the run was asked to stop"
            self.progress.message(f"test loss at iteration {position.iteration}: {loss}")
        if not reason:
            resumed = f" ({first + 1} to {position.iteration}): the run is complete" if first else ""
            reason = f"trained {position.iteration - first} iterations{resumed}"
        checkpoint, best = self.state.config.checkpoint, self.state.best
        if checkpoint.keep_best and best.loss is not None:
            # It may be of the run that --load continues, in the folder of that one, or no longer there.
            folders = [checkpoint.save, None if checkpoint.finetune else checkpoint.load]
            paths = [best_checkpoint(Path(folder), best.iteration) for folder in folders if folder]
            where = next((f": {path}" for path in paths if path), "")
            reason += f"\nlowest validation loss {best.loss:.6E} at iteration {best.iteration}{where}"
        if checkpoint.save and self._can_continue():
            flag = "" if checkpoint.resume == "auto" else " with --resume auto"
            reason += f"\nto continue, repeat the command{flag}"
        if position.iteration > first and not saves_weights(checkpoint):
            reason += "\nWARNING: without --save nothing was saved: what this run has trained is lost"
        return reason

    def _can_continue(self) -> bool:
        """Return True if the run was interrupted before its end."""
        return self.state.best.was_interrupted or (
            self.state.position.iteration < self.data.train_iters and not self._ends_early()
        )

    def _interrupted_validation(self) -> str:
        """Make up for the validation that the run before did not end. Returns why this run ends too, or ""."""
        if not self.state.best.was_interrupted or self.data.valid is None:
            return ""
        if not (validation := self._validation()):
            return self._asked_to_stop()
        self._write(self._place() | validation)
        self.saved_iteration = -1  # its checkpoint does not know of this validation
        return ""

    def _nothing_to_do(self) -> str:
        """Say why a resumed run has nothing left, or nothing."""
        iteration, length = self.state.position.iteration, self.data.train_iters
        if iteration >= length:
            later = f", and the checkpoint is of iteration {iteration}" if iteration > length else ""
            return (
                f"nothing to do: the run was complete at iteration {length}{later}; to train longer, raise its length "
                f"and add --override-opt-param-scheduler"
            )
        if early := self._ends_early():
            return f"nothing to do: {early}; to continue, raise --early-stopping-patience, or leave it out"
        return ""

    def _one_iteration(self, microbatches: list) -> str:
        """Train one step and do what is due after it. Returns why the run should end now, or an empty string."""
        config, position = self.state.config, self.state.position
        self.watchers.before_step(position.iteration)
        by_layer = config.logging.log_grad_norm_by_layer and self._is_recorded(position.iteration + 1)
        # A signal or the clock may stop one rank only. The step's own all-reduce makes it a decision of all: it is read
        # there, after forward and backward, so that the step in progress is the last.
        with written_after(config.parallel.seconds_to_wait):
            around_forward = self.watchers.own_work.of_device
            report = step.train_step(self.state, microbatches, self._wants_to_stop, by_layer, around_forward)
        # The position first, since log lines and checkpoints record it. Validation and saves happen between steps, on
        # all ranks; both wait for parameters that are still being gathered (`whole_parameters`).
        self.state.advance(report.num_positions)
        self.watchers.after_step(position.iteration, report)
        self.progress.advance(position.iteration)
        is_first_step = position.iteration == self.started_from + 1
        if is_first_step:
            self._check_gradients(report)
            if (seconds := config.parallel.distributed_timeout_seconds_after_init) is not None:
                shorten_timeout(seconds)  # the first step alone may compile kernels and open connections
        reason = self._asked_to_stop() if report.stop else ""
        is_last = position.iteration >= self.data.train_iters
        if not reason and not is_last and _due(position.iteration, config.training.exit_interval):
            reason = f"--exit-interval reached at iteration {position.iteration}"
        if is_first_step and not reason:
            # Show the first step at once, unless the log interval does.
            if not _due(position.iteration, config.logging.log_interval):
                self.progress.update(self._numbers(report), only_in_bar=True)
        elif self.planned_peak is not None:
            self._compare_peaks()
        reason = self._log_and_validate(report, reason) or self._ends_early()
        self._report_save(self.saver.finish(wait=False))  # a background save that has ended since
        is_best = config.checkpoint.keep_best and self.state.best.iteration == position.iteration
        if is_best or _due(position.iteration, config.checkpoint.save_interval):
            self._save()
        if not reason and position.iteration < self.data.train_iters:
            self._after_step(is_last=False)
        return reason

    def _after_step(self, is_last: bool) -> None:
        if self.after_step is not None:
            with self.watchers.paused():
                message = self.after_step(self.state, is_last)
            if message:
                self.progress.message(message)

    def _asked_to_stop(self) -> str:
        return f"asked to stop at iteration {self.state.position.iteration}"

    def _ends_early(self) -> str:
        """Say that --early-stopping-patience has run out, or nothing."""
        patience, best = self.state.config.training.early_stopping_patience, self.state.best
        if patience is None or best.num_since < patience:
            return ""
        lowest = "finite one" if best.loss is None else f"lower one than {best.loss:.6E} at iteration {best.iteration}"
        return (
            f"stopped early at iteration {self.state.position.iteration}: {best.num_since} validation losses without a "
            f"{lowest} (--early-stopping-patience {patience})"
        )

    def _wants_to_stop(self) -> bool:
        limit = self.state.config.training.exit_duration_in_mins
        minutes = (time.monotonic() - self.started_at) / 60
        return self.signals.received or self.progress.is_closed or (limit is not None and minutes > limit)

    def _validates(self, iteration: int) -> bool:
        is_due = iteration == self.data.train_iters or _due(iteration, self.state.config.training.eval_interval)
        return is_due and self.data.valid is not None

    def _is_recorded(self, iteration: int) -> bool:
        """Whether the iteration has a log line, even if the run does not end early."""
        is_due = iteration == self.data.train_iters or _due(iteration, self.state.config.logging.log_interval)
        return is_due or self._validates(iteration)

    def _log_and_validate(self, report: step.StepReport, reason: str) -> str:
        """Returns why the run should end now: `reason`, or that validation was interrupted."""
        iteration = self.state.position.iteration
        # A run that stops early logs, but validates only if that is due.
        if not (self._is_recorded(iteration) or reason):
            return ""
        record = self._record(report)
        if validates := self._validates(iteration):
            validation = self._validation()
            record |= validation
            reason = reason or ("" if validation else self._asked_to_stop())
        if validates or iteration == self.data.train_iters:
            record |= self._orthogonality()
        self._write(record)
        return reason

    def _validation(self) -> Record:
        """The validation loss; nothing if the run was asked to stop meanwhile, since it may be killed if it is slow."""
        assert self.data.valid is not None
        try:
            with self.watchers.around_validation():
                loss = self._loss_on(self.data.valid, "validation")
        except step.ValidationInterrupted:
            self.state.best = replace(self.state.best, was_interrupted=True)
            return {}
        # Rank 0 decides for all: a loss that differs in its last bit would end one rank only.
        self.state.best = from_first_rank(lambda: self.state.best.after(loss, self.state.position.iteration))
        return {"validation_loss": loss}

    def _loss_on(self, batches: GlobalBatches, what: str) -> float:
        tracked = self.progress.track(batches, what, batches.num_steps)
        by_sample: list[Tensor] | None = [] if self.state.config.logging.log_validation_items else None
        loss = step.validation_loss(self.state.model_chunks, tracked, self._wants_to_stop, by_sample)
        if by_sample is not None:
            # A sample's losses are on one replica's last stage; its tensor-parallel ranks have the same.
            own = dict(zip(batches.own_samples(), torch.stack(by_sample).tolist(), strict=True)) if by_sample else {}
            of_all = {sample: pair for of_rank in gather_over_world(own) for sample, pair in of_rank.items()}
            sums = {sample: of_all[sample][0] for sample in sorted(of_all)}
            counts = {sample: int(of_all[sample][1]) for sample in sums}
            self.writer.write_items(self.state.position.iteration, what, sums, counts)
        return loss

    def _write(self, record: Record) -> None:
        self.writer.write(record)
        self.progress.update(record)
        self.watchers.interval = Interval()

    def _orthogonality(self) -> Record:
        with whole_parameters(self.state.model_chunks):
            error = step.largest_orthogonality_error(self.state)
        if error is None:
            return {}
        if not error <= step.ORTHOGONALITY_LIMIT:
            off = f"{error:.1e} away from orthogonal, above {step.ORTHOGONALITY_LIMIT:.0e}"
            self.progress.message(f"WARNING: a rotation is {off}: lower --peft-lr-rotation.")
        return {"orthogonality_error": error}

    def _check_gradients(self, report: step.StepReport) -> None:
        """Warn after the first step about adapters without a gradient, which would silently never train."""
        lost = step.layers_without_gradient(self.state) if report.num_tokens else []
        if lost:
            self.progress.message(
                f"WARNING: {len(lost)} adapted layers have no gradient after the first step ({', '.join(lost[:4])}"
                f"{', ...' if lost[4:] else ''}): they will not be trained."
            )

    def _compare_peaks(self) -> None:
        """The peak after the second step, the first one with the optimizer's moments; told once the plan is known."""
        self.measured_peak = self.measured_peak or memory_bytes()[1]
        planned = self.planned_peak() if self.planned_peak else None
        if planned is None:
            return
        self.planned_peak = None
        if isinstance(planned, str):
            comparison = f"not planned: the rehearsal failed ({planned}"
        else:
            comparison = f"{planned / 2**30:.2f} GiB planned ({self.measured_peak / planned - 1:+.1%}"
        measured = f"{self.measured_peak / 2**30:.2f} GiB measured"
        self.progress.message(f"peak memory of rank 0: {measured}, {comparison}; --no-plan leaves this out)")

    def _record(self, report: step.StepReport) -> Record:
        """All fields of a log line but those of a validation. A collective."""
        record = self._numbers(report)
        record |= self.watchers.speed(record)
        if report.layer_grad_norms:
            record["grad_norm_by_layer"] = {str(layer): norm for layer, norm in enumerate(report.layer_grad_norms)}
        if mixture := mixtures(self.state, self.mixed_layers):
            self.writer.write_layers(self.state.position.iteration, "lambda", mixture.by_layer)
            if mixture.num_kept:
                self.progress.message(
                    f"WARNING: a lambda has kept its last value {mixture.num_kept} times: the gradients of its layer "
                    f"were zero or not finite."
                )
            values = mixture.by_layer.values()
            record["lambda"] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        return record

    def _place(self) -> Record:
        position = self.state.position
        return {
            "iteration": position.iteration,
            "epoch": self.data.train.order.epochs_at(position.consumed_samples),
            "consumed_samples": position.consumed_samples,
            "consumed_tokens": position.consumed_tokens,
        }

    def _numbers(self, report: step.StepReport) -> Record:
        memory, peak = memory_bytes()
        return self._place() | {
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            **self.watchers.interval.averages(),
            "memory_bytes": memory,
            "peak_memory_bytes": peak,
        }

    def _save(self) -> None:
        """Start a checkpoint; its time does not count as time of a step."""
        with self.watchers.paused():
            self._report_save(self.saver.finish())  # one save at a time: wait for the one before
            self.saver.start(self.state)
            self._report_save(self.saver.finish(wait=False))

    def _save_the_end(self) -> None:
        """Wait for the pending save, then write the last checkpoint unless it exists (a failed save is tried again)."""
        self._report_save(self.saver.finish())
        if self.state.config.checkpoint.save and self.saved_iteration != self.state.position.iteration:
            self.saver.start(self.state)
            outcome = self.saver.finish()
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            self._report_save(outcome)

    def _report_save(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if outcome.error is not None:
            self.progress.message(f"WARNING: {outcome.error} Training continues without it.")
            return
        self.saved_iteration = outcome.iteration
        self.progress.message(f"saved iteration {outcome.iteration} in {self.state.config.checkpoint.save}")


def saves_weights(checkpoint: CheckpointConfig) -> bool:
    """Return True if a run leaves its trained weights somewhere: in --save, or on --sync-server."""
    return checkpoint.save is not None or checkpoint.sync_server is not None


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
