"""What one GPU settles of docs/untested-on-cuda.md, as lines: cheap ones first, so that a broken set-up shows at once.

A line is the tests that are marked `gpu(name of the line)`, with the figures that they record. `make test` runs the
same tests on a CPU. The lines are declared here without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SIZES_VARIABLE = "MEGATRON_PEFT_CHECK_GPU"  # of the environment: which sizes the tests take


@dataclass(frozen=True)
class Line:
    """Tests that settle something together: the title of their table, and rows of docs/untested-on-cuda.md."""

    title: str
    settles: tuple[str, ...] = ()  # by their first column


LINES: Mapping[str, Line] = {
    "versions": Line("Versions, the device and the flags that round float32 products"),
    "world": Line("One process, an in-memory store, nothing patched", ("one process", "no patches")),
    "precision": Line("Rotations while the program allows TF32", ("IEEE float32",)),
    "layers": Line(
        "Each method's adapted layers against float64 on the CPU",
        ("bf16 at full speed", "float32 gradients of bf16 factors", "small matrices"),
    ),
    "alibi": Line("Core attention with ALiBi against float64 on the CPU", ("ALiBi",)),
    "losses": Line(
        "Ten losses of a two-layer Llama against those of the CPU",
        ("no patches", "Transformer Engine", "packed samples", "fused Adam", "bf16 at full speed"),
    ),
    "fusions": Line(
        "Ten losses without each fused kernel",
        ("fused kernels", "fused cross entropy", "compiled kernels", "fused Adam"),
    ),
    "attention": Line(
        "The kernels that --attention-backend chooses", ("torch's attention kernels", "attention backend")
    ),
    "recompute": Line("Dropout while activations are recomputed", ("dropout and recompute", "recomputed norms")),
    "waits": Line("Where the host waits for the device", ("a step that does not wait", "lambda without a wait")),
    "checkpoints": Line("Checkpoints, written before and while training goes on"),
    "answers": Line("Greedy answers and scores against transformers'", ("generation and scoring",)),
    "memory": Line(
        "Memory as the allocator counts it and as it is planned", ("memory metrics", "unused memory", "planned memory")
    ),
    "layer-time": Line(
        "One layer of a 405B model as a rank of TP8 holds it", ("few kernels a layer", "bf16 at full speed")
    ),
    "rotations-time": Line("Blocks of rotations, and uRNN by Fourier transforms", ("small matrices",)),
    "model-speed": Line("LoRA on a model of 1B parameters", ("bf16 at full speed",)),
}
