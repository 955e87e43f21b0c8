"""Metrics of a run: `metrics.jsonl` under --save, TensorBoard and Weights & Biases.

One JSON object per log interval, with the fields that `training.loop` records. The Hybrid's lambda of each layer is in
`lambda.jsonl`: {"iteration": N, "lambda": {"decoder.layers.0.self_attention.linear_qkv": 0.41, ...}}.
"""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from itertools import count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, LoggingConfig, require
from megatron_peft.config.untrusted import parse_json, require_regular

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ITEMS_FILE = "{}_items.jsonl"  # with --log-validation-items, a line a validation or test
# Fields of a record -> curves of TensorBoard and Weights & Biases, which group them by what stands before the slash. A
# field that is not here has its own name; of a mapping it is NAME/KEY, as in lambda/mean.
TAGS = {
    **{name: f"train/{name}" for name in ("loss", "learning_rate", "grad_norm")},
    "validation_loss": "validation/loss",
    "orthogonality_error": "validation/orthogonality_error",
    **{name: f"position/{name}" for name in ("epoch", "consumed_samples", "consumed_tokens", "interval_steps")},
    **{name: f"speed/{name}" for name in ("step_seconds", "tokens_per_second", "tokens_per_second_per_gpu")},
    **{name: f"speed/{name}" for name in ("tflops_per_gpu", "mfu", "joules_per_step")},
    "memory_bytes": "memory/bytes",
    "peak_memory_bytes": "memory/peak_bytes",
}
MAPPINGS = {"grad_norm_by_layer", "lambda", "timer_seconds", "slowest_rank", "loss_sums", "num_tokens"}  # of numbers
PROCESS_STATUS = Path("/proc/self/status")


class MetricsWriter(ExitStack):
    """Writes one record per log interval to `metrics.jsonl`, TensorBoard and Weights & Biases; a context manager.

    is_writer: whether this rank writes (one rank does); if not, all methods do nothing.
    resumed_iteration: records after this iteration are removed, since it will be trained again. 0 starts a new file,
    and an existing one is kept as `metrics.1.jsonl` and so on.
    hold_folder: `Saver.hold_folder`, called before a file is made.
    Raises ConfigurationError: --save cannot be written.
    """

    def __init__(
        self,
        save_dir: str | Path | None,
        logging: LoggingConfig,
        is_writer: bool,
        resumed_iteration: int = 0,
        run_settings: Mapping[str, Any] | None = None,
        hold_folder: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._hold_folder = hold_folder
        self._folder = Path(save_dir) if is_writer and save_dir is not None else None
        self._files: dict[str, _Lines] = {}  # by name, in the folder
        self._resumed_iteration = resumed_iteration
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_writer:
            return
        if self._folder is not None:
            self._open(METRICS_FILE)
        if logging.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes over a second to import

            self._tensorboard = SummaryWriter(logging.tensorboard_dir, purge_step=resumed_iteration + 1)
            self.callback(self._tensorboard.close)
        if logging.wandb_project is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            folder = logging.wandb_save_dir or (str(Path(save_dir) / "wandb") if save_dir else "wandb")
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = logging.wandb_exp_name or (Path(save_dir).resolve().name if save_dir else None)  # None: W&B's own
            config = dict(run_settings or {})
            self._wandb = wandb.init(project=logging.wandb_project, name=name, dir=folder, config=config)
            self.callback(self._wandb.finish)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record: `iteration`, and numbers or mappings of numbers; names (of a host) go to the file only."""
        if self._folder is not None:
            self._open(METRICS_FILE).append(json.dumps(finite(record)))
        scalars = dict(_scalars(record))
        iteration = int(scalars.pop("iteration"))
        scalars = {TAGS.get(name, name): value for name, value in scalars.items()}
        if self._tensorboard is not None:
            self._add_to_tensorboard(scalars, iteration)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=iteration)

    def write_items(
        self, iteration: int, data: str, loss_sums: Mapping[int, float], num_tokens: Mapping[int, int]
    ) -> None:
        """Write what each sample adds to a loss to `validation_items.jsonl`, or of a test to `test_items.jsonl`."""
        if self._folder is not None:
            record = {"iteration": iteration, "loss_sums": loss_sums, "num_tokens": num_tokens}
            self._open(ITEMS_FILE.format(data)).append(json.dumps(finite(record)))

    def write_layers(self, iteration: int, name: str, by_layer: Mapping[str, float]) -> None:
        """Write a number per layer to `{name}.jsonl` and, as one curve per layer, to TensorBoard."""
        if self._folder is not None:
            self._open(f"{name}.jsonl").append(json.dumps(finite({"iteration": iteration, name: by_layer})))
        if self._tensorboard is not None:
            scalars = {f"{name}_by_layer/{layer}": value for layer, value in by_layer.items()}
            self._add_to_tensorboard(scalars, iteration)

    def _add_to_tensorboard(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write one event: `add_scalar` makes one of each number, 40 ms for the lambdas of 126 layers."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._tensorboard.file_writer.add_summary(Summary(value=values), iteration)

    def _open(self, name: str) -> "_Lines":
        """The file of this name in the folder, opened at its first use."""
        assert self._folder is not None
        if name not in self._files:
            path = self._folder / name
            try:
                self._hold_folder()
                path.parent.mkdir(parents=True, exist_ok=True)
                _drop_records_after(path, self._resumed_iteration)
                self._files[name] = _Lines(path, self._hold_folder)
                self.callback(self._files[name].close)
            except OSError as error:
                raise ConfigurationError(f"--save {path.parent} cannot be written: {error}.") from error
        return self._files[name]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without a last line torn by a kill; none without the file.

    Raises ConfigurationError, with file and line number, for any other line that is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    require_regular(path)
    with path.open("rb") as file:
        records = [_record_of(line, f"{path}, line {number}") for number, line in enumerate(file, start=1)]
    return [record for record in records if record is not None]


def _record_of(line: bytes, place: str) -> dict[str, Any] | None:
    """The record that a line holds; None for the last line of a file if its write was cut short."""
    try:
        record = parse_json(line, place)
        groups = [value if name in MAPPINGS else {"": value} for name, value in record.items()]
        numbers = [value for group in groups for name, value in group.items() if name != "host"]  # the slowest rank's
        is_number = [isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in numbers]
        if type(record["iteration"]) is not int or numbers.count(None) + sum(is_number) < len(numbers):
            raise TypeError
    except (ConfigurationError, AttributeError, TypeError, KeyError) as error:
        if not line.endswith(b"\n"):
            return None
        raise ConfigurationError(f"{place}: not a record of metrics: {line[:80]!r}.") from error
    return record


def memory_bytes() -> tuple[int, int]:
    """(current, peak) memory of this process in bytes: of torch's allocator on CUDA, resident set size on a CPU."""
    import torch  # not at the top: `read_metrics` works without torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if PROCESS_STATUS.exists():
        status = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
        resident, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return resident, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak  # without /proc only the peak is known


class _Lines:
    """A file that grows by whole lines. A full disk loses lines, with a warning, but never ends the run.

    If somebody moves or removes the file, the next line goes to a new one, unless another run has the folder by then.
    """

    def __init__(self, path: Path, hold_folder: Callable[[], None]) -> None:
        self._path = path
        self._hold_folder = hold_folder
        self._file = path.open("ab", buffering=0)
        self._num_lost = 0  # lines, since the last one that was written

    def append(self, line: str) -> None:
        is_in_place = False
        with suppress(OSError):
            is_in_place = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        if not is_in_place:
            self._reopen()
        start = self._file.seek(0, os.SEEK_END)
        left = memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._file.truncate(start)  # remove a partly written line
            if not self._num_lost:
                logger.warning("%s cannot be written (%s): the run continues", self._file.name, error.strerror)
            self._num_lost += 1
            return
        if self._num_lost:
            logger.warning("%s can be written again; %d lines are not in it", self._file.name, self._num_lost)
            self._num_lost = 0

    def close(self) -> None:
        self._file.close()

    def _reopen(self) -> None:
        try:
            self._hold_folder()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("ab", buffering=0)
        except (OSError, ConfigurationError) as error:
            logger.warning("%s was moved or removed, and cannot be recreated: %s", self._path, error)
            return
        logger.warning("%s was moved or removed during the run: the next lines are in a new one", self._path)
        self._file.close()
        self._file = file


def _drop_records_after(path: Path, iteration: int) -> None:
    """Cut off the records after `iteration`, which are the last ones; a kill leaves the old file or the cut one.

    Only what is cut off is read: all ranks wait, and a log may have gigabytes. A new run, at 0, renames the file to the
    first NAME.1, NAME.2, ... that is free.
    """
    if not path.exists():
        return
    if iteration == 0:
        numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        path.rename(next(other for other in numbered if not other.exists()))
        return
    require_regular(path)
    if not (end := path.stat().st_size):
        return
    with path.open("r+b") as file:
        with mmap(file.fileno(), end, access=ACCESS_READ) as text:
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                record = _record_of(text[start:end], f"{path}, byte {start}")
                if record is not None and record["iteration"] <= iteration:
                    break
                end = start
            is_cut_short = end > 0 and text[end - 1 : end] != b"\n"
        file.truncate(end)
        file.seek(end)
        file.write(b"\n" * is_cut_short)
        file.flush()
        os.fsync(file.fileno())


def require_loggers(logging: LoggingConfig) -> None:
    """Raises ConfigurationError if a package that the flags need is not installed. Imports nothing."""
    require(
        logging.wandb_project is None or find_spec("wandb") is not None,
        "--wandb-project needs the package wandb, which is not installed: pip install wandb, or drop the flag.",
    )
    require(
        not logging.log_energy or find_spec("pynvml") is not None,
        "--log-energy needs the package nvidia-ml-py, which is not installed: pip install nvidia-ml-py, or drop the "
        "flag.",
    )


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number; `outer/inner` for nested mappings."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif value is not None and not isinstance(value, str):
            yield prefix + name, value


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, since JSON cannot hold them."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
