"""Speed in every log alike; garbage collection at agreed steps, and which steps of which ranks are profiled."""

import gc
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from megatron_peft.config import LoggingConfig, TrainingConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.training import watchers as module
from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.step import StepReport, finish_gradients, finish_with, run_schedule
from megatron_peft.training.watchers import Energy, Interval, ModelFlops, OwnWork, Watchers, throughput, watched_steps
from tests.tiny_gpt import SIZES
from tests.training.recorded_saves import RecordedSaves

SHAPE = ModelShape(**SIZES)


def test_flops_of_llama_70b_are_four_or_six_times_its_weights():
    """70.55 billion parameters, of which the embedding and the norms multiply nothing."""
    sizes = dict(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8)
    shape = ModelShape("llama", **sizes, kv_channels=128, vocab_size=128256, max_position_embeddings=131072)
    multiplied = 70_553_706_496 - 128256 * 8192 - 161 * 8192
    assert ModelFlops.of(shape, is_frozen=True).per_token == 4 * multiplied
    assert ModelFlops.of(shape, is_frozen=False).per_token == 6 * multiplied
    assert ModelFlops.of(shape, is_frozen=True).per_pair == 12 * 80 * 8192


@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "selective"}])
def test_flops_are_those_that_torch_counts(start, recompute):
    """In full fine-tuning, where no adapter adds its own; torch counts the masked half of the scores too."""
    state, data = start(
        peft={"method": "full"}, model={"attention_backend": "unfused", "make_vocab_size_divisible_by": 7},
        data_settings={"pad_to_seq_length": True}, transformer=recompute,
    )  # fmt: skip
    step = data.train.step_at(0)
    finish_with(state.model_chunks, finish_gradients)
    with FlopCounterMode(display=False) as counter:
        run_schedule(state.model_chunks, step, forward_only=False)
    by_operation = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    batched = by_operation.pop("aten.bmm", 0)
    flops = ModelFlops.of(state.shape, is_frozen=False)
    assert sum(by_operation.values()) == flops.count(sum(one.tokens.numel() for one in step), 0)
    length = state.config.data.seq_length
    scores = flops.count(0, sum(one.num_pairs for one in step)) * 2 * length / (length + 1)
    assert batched == pytest.approx(scores * (4 / 3 if recompute else 1))  # the model's own are the same


def test_throughput_is_of_a_gpu_and_mfu_a_part_of_its_peak():
    config = SimpleNamespace(
        logging=LoggingConfig(log_throughput=True, peak_tflops=2.0),
        parallel=SimpleNamespace(world_size=4),
        peft=SimpleNamespace(trains_adapters=True),
    )
    flops = ModelFlops.of(SHAPE, is_frozen=True)
    numbers = throughput(config, SHAPE, 10**9, 10**9, seconds=5.0)  # pyright: ignore[reportArgumentType]
    tflops = 1e9 * (flops.per_token + flops.per_pair) / 5 / 4 / 1e12
    expected = {"tokens_per_second_per_gpu": 5e7, "tflops_per_gpu": tflops, "mfu": tflops / 2}
    assert numbers == pytest.approx(expected)
    config.logging = LoggingConfig()
    assert throughput(config, SHAPE, 10**9, 10**9, seconds=5.0) == {}  # pyright: ignore[reportArgumentType]


def test_every_log_has_speed_timers_and_gradient_norms_by_layer(start, tmp_path, monkeypatch, capsys):
    sent, told = [], {}
    run = SimpleNamespace(log=lambda scalars, step: sent.append(scalars), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: told.update(settings) or run))
    flags = {"log_throughput": True, "peak_tflops": 1.0, "log_grad_norm_by_layer": True, "timing_log_level": "2"}
    loggers = {"tensorboard_dir": str(tmp_path / "tb"), "wandb_project": "p", "wandb_exp_name": "e"}
    state, data = start(
        num_steps=2, checkpoint={"save": str(tmp_path)}, logging={"log_interval": 2, **flags, **loggers}
    )
    train(state, data, RecordedSaves())
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert record["tokens_per_second_per_gpu"] == pytest.approx(record["tokens_per_second"])
    norms, timers = record["grad_norm_by_layer"], record["timer_seconds"]
    assert [*norms] == ["0", "1"] and sum(n**2 for n in norms.values()) == pytest.approx(record["grad_norm"] ** 2)
    assert 0 < timers["forward-compute"] < timers["forward-backward"] < record["step_seconds"]
    assert "optimizer-inner-step" in timers
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    names = {
        "speed/tflops_per_gpu",
        "speed/mfu",
        "speed/tokens_per_second_per_gpu",
        "grad_norm_by_layer/1",
        "timer_seconds/forward-backward",
    }
    assert names <= {*board.Tags()["scalars"]} and names <= {*sent[0]}
    assert all("/" in name for name in sent[0]), "a curve without a group"
    assert told["config"]["peft"]["lora_rank"] == 4 and json.dumps(told["config"])
    printed = capsys.readouterr().out
    assert "throughput per GPU (TFLOP/s/GPU): " in printed and "forward-backward " in printed
    assert json.loads((tmp_path / METRICS_FILE).read_text())["mfu"] == record["tflops_per_gpu"]


def test_timers_are_those_of_the_slowest_rank(start, monkeypatch):
    """The other rank is a stage whose forward passes take longer, and which has a phase that this one lacks."""
    state, _ = start(logging={"timing_log_level": "2"})
    watchers = Watchers(state)
    gathered = []
    monkeypatch.setattr(
        module, "gather_over_world", lambda own: [gathered.append(own) or own, ["forward-compute", "forward-recv"]]
    )
    other = torch.tensor([0.0, 8.0, 4.0, 0.0], dtype=torch.float64)  # nothing new, then by name
    monkeypatch.setattr(module, "largest_over_world", lambda own: torch.maximum(own, other[: len(own)]).tolist())
    timers = watchers._timers._timers
    for optimizer_seconds in (1.0, 3.0):
        timers("forward-compute", log_level=2).set_elapsed(2.0)
        timers("optimizer", log_level=1).set_elapsed(optimizer_seconds)
        expected = {"forward-compute": 4.0, "forward-recv": 2.0, "optimizer": optimizer_seconds / 2}
        assert watchers._timers.record(num_steps=2) == {"timer_seconds": expected}
    assert gathered == [["forward-compute", "optimizer"]], "names alone, and only when there are new ones"


def test_what_happens_in_a_pause_is_not_timed(start, monkeypatch):
    state, data = start(logging={"timing_log_level": "2"})
    watchers = Watchers(state)
    watchers.interval = Interval(num_steps=1)
    clock, began_at = iter([3.0, 10.0]), watchers.interval.started_at
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "perf_counter", lambda: next(clock))
        with watchers.paused():
            pass
    assert watchers.interval.started_at == began_at + 7.0
    with watchers.paused():
        run_schedule(state.model_chunks, data.train.step_at(0), forward_only=True)
    assert "timer_seconds" not in watchers.speed({"step_seconds": 1.0})
    run_schedule(state.model_chunks, data.train.step_at(0), forward_only=True)
    assert watchers.speed({"step_seconds": 1.0})["timer_seconds"]["forward-compute"] > 0


def test_energy_is_that_of_all_gpus_since_the_last_line_without_pauses(monkeypatch, caplog):
    Energy(LoggingConfig(log_energy=True))
    assert "there is no GPU" in caplog.text
    from megatron.core import energy_monitor

    meter = iter([1_000, 5_000, 50_000, 53_000, 54_000])  # millijoules: start, pause, resume, line, line
    fakes = {"has_nvml": True, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda device: device}
    fakes |= {"nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(meter), "NVMLError": OSError}
    for name, fake in fakes.items():
        monkeypatch.setattr(energy_monitor, name, fake, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.mul_(2))  # two GPUs
    energy = Energy(LoggingConfig(log_energy=True))
    with energy.paused():
        pass
    assert energy.record(num_steps=2) == {"joules_per_step": 7.0}
    assert energy.record(num_steps=1) == {"joules_per_step": 2.0}


def test_the_slowest_rank_is_named_with_the_seconds_of_its_own_work_in_a_step(monkeypatch):
    clock = iter([0.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "gather_over_world", lambda own: ["a", own, "c"])
    monkeypatch.setattr(module, "largest_over_world", lambda own: [0.5, *own.tolist()[1:2], 9.0])
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    work = OwnWork(LoggingConfig(log_straggler=True))
    with work.of_host():
        pass
    slowest = {"rank": 2, "host": "c", "seconds": 9.0}
    assert work.record(num_steps=2) == {"slowest_rank": {**slowest, "median_seconds": 3.0}}
    with work.of_device():
        pass
    later = {**slowest, "median_seconds": 1.0}
    assert work.record(num_steps=1) == {"slowest_rank": later}, "that before counts no more"


def _without_model(training: TrainingConfig, logging: LoggingConfig) -> Any:
    config = SimpleNamespace(training=training, logging=logging)
    return SimpleNamespace(config=config, shape=SHAPE, model_chunks=[], optimizer=None)


def run(monkeypatch: pytest.MonkeyPatch, rank: int, training: dict, logging: dict, num_steps: int) -> list:
    """What happens in a run, in order: steps by number, collections, and starts and stops of CUDA's profiler."""
    happened = []
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(module.gc, "collect", lambda generation=2: happened.append(f"collect {generation}"))
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: happened.append("start"), cudaProfilerStop=lambda: happened.append("stop")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda record_shapes: nullcontext())
    with watched_steps(_without_model(TrainingConfig(**training), LoggingConfig(**logging))) as watchers:
        happened.append(gc.isenabled())
        for finished in range(num_steps):
            watchers.before_step(finished)
            happened.append(finished + 1)
            watchers.after_step(finished + 1, StepReport(2.5, 1, 1, 1, 1.0, 1e-3, False))
        with watchers.around_validation():
            happened.append("validation")
    assert gc.isenabled()
    return happened


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, [True, 1, 2, 3, "validation"]),
        ({"manual_gc": True}, ["collect 2", False, 1, 2, 3, "collect 2", "validation", "collect 0"]),
        (
            {"manual_gc": True, "manual_gc_interval": 2, "manual_gc_eval": False},
            ["collect 2", False, 1, 2, "collect 2", 3, "validation"],
        ),
    ],
)
def test_garbage_is_collected_when_it_is_asked_for(training, expected, monkeypatch):
    assert run(monkeypatch, 0, training, {}, num_steps=3) == expected


@pytest.mark.parametrize(
    ("rank", "num_steps", "expected"),
    [
        (1, 5, [1, 2, "start", 3, 4, "stop", 5, "validation"]),
        (0, 5, [1, 2, 3, 4, 5, "validation"]),
        (3, 3, [1, 2, "start", 3, "validation", "stop"]),  # a run that ends within them
    ],
)
def test_nsight_sees_the_steps_between_start_and_end_on_the_ranks_that_are_named(
    rank, num_steps, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    logging = {"profile": True, "profile_step_start": 2, "profile_step_end": 4, "profile_ranks": (1, 3)}
    happened = run(monkeypatch, rank, {}, logging, num_steps)
    assert happened == [True, *expected]


def test_memorys_history_is_written_on_the_ranks_that_are_named_also_after_an_error(tmp_path, monkeypatch, caplog):
    logging = {"record_memory_history": True, "memory_snapshot_path": str(tmp_path / "new" / "s.pickle")}
    run(monkeypatch, 3, {}, {**logging, "profile_ranks": (1, 3)}, num_steps=1)
    assert "--record-memory-history needs a GPU" in caplog.text
    happened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **told: happened.append(told))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: happened.append(path))
    run(monkeypatch, 0, {}, {**logging, "profile_ranks": (1, 3)}, num_steps=1)
    assert happened == []
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    state = _without_model(TrainingConfig(), LoggingConfig(**logging, profile_ranks=(1, 3)))
    with pytest.raises(MemoryError), watched_steps(state):
        raise MemoryError
    expected = str(tmp_path / "new" / "s.rank3.pickle")
    assert happened == [{"max_entries": module.MOST_ALLOCATIONS}, expected, {"enabled": None}]
    assert (tmp_path / "new").is_dir()
