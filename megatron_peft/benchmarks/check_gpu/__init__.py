"""What one GPU settles of docs/untested-on-cuda.md, as lines: cheap ones first, so that a broken set-up shows at once.

A line is the tests that are marked `gpu(name of the line)`, with the figures that they record. `make test` runs the
same tests on a CPU. The lines are declared here without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SIZES_VARIABLE = "MEGATRON_PEFT_CHECK_GPU"  # of the environment: which of `subjects.SIZES` the tests take


@dataclass(frozen=True)
class Line:
    """Tests that settle something together.

    Args:
        files: with the tests, below tests/.
        title: of its table.
        settles: rows of docs/untested-on-cuda.md, by their first column.
    """

    files: tuple[str, ...]
    title: str
    settles: tuple[str, ...] = ()


ON_ONE_GPU = ("benchmarks/test_on_one_gpu.py",)
SHORT_RUNS = ("training/test_short_runs.py",)
ATTENTION = ("models/test_attention.py",)
LINES: Mapping[str, Line] = {
    "versions": Line(ON_ONE_GPU, "Versions, the device and the flags that round float32 products"),
    "world": Line(
        ("runtime/test_launch.py",), "One process, an in-memory store, nothing patched", ("one process", "no patches")
    ),
    "precision": Line(("adapters/test_precision.py",), "Rotations while the program allows TF32", ("IEEE float32",)),
    "layers": Line(
        ("adapters/test_float64.py",),
        "Each method's adapted layers against float64 on the CPU",
        ("bf16 at full speed", "float32 gradients of bf16 factors", "small matrices"),
    ),
    "alibi": Line(ATTENTION, "Core attention with ALiBi against float64 on the CPU", ("ALiBi",)),
    "losses": Line(
        SHORT_RUNS,
        "Ten losses of a two-layer Llama against those of the CPU",
        ("no patches", "Transformer Engine", "packed samples", "fused Adam", "bf16 at full speed"),
    ),
    "fusions": Line(
        SHORT_RUNS,
        "Ten losses without each fused kernel",
        ("fused kernels", "fused cross entropy", "compiled kernels", "fused Adam"),
    ),
    "attention": Line(
        ATTENTION, "The kernels that --attention-backend chooses", ("torch's attention kernels", "attention backend")
    ),
    "recompute": Line(
        SHORT_RUNS, "Dropout while activations are recomputed", ("dropout and recompute", "recomputed norms")
    ),
    "waits": Line(
        ("training/test_no_waits.py",),
        "Where the host waits for the device",
        ("a step that does not wait", "lambda without a wait"),
    ),
    "checkpoints": Line(("checkpoint/test_load.py",), "Checkpoints, written before and while training goes on"),
    "answers": Line(
        ("evaluation/test_generation.py",),
        "Greedy answers and scores against transformers'",
        ("generation and scoring",),
    ),
    "memory": Line(
        (*ON_ONE_GPU, "training/test_metrics.py"),
        "Memory as the allocator counts it and as it is planned",
        ("memory metrics", "unused memory", "planned memory"),
    ),
    "layer-time": Line(
        ON_ONE_GPU, "One layer of a 405B model as a rank of TP8 holds it", ("few kernels a layer", "bf16 at full speed")
    ),
    "rotations-time": Line(ON_ONE_GPU, "Blocks of rotations, and uRNN by Fourier transforms", ("small matrices",)),
    "model-speed": Line(ON_ONE_GPU, "LoRA on a model of 1B parameters", ("bf16 at full speed",)),
}
