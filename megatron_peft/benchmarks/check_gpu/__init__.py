"""What one GPU settles of docs/untested-on-cuda.md, as lines: cheap ones first, so that a broken set-up shows at once.

The lines are declared here, without torch; `function_of` names the function of a line, in the module that it says.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A group of figures that one function measures.

    Args:
        module: of this folder, with the function.
        title: of its table.
        settles: rows of docs/untested-on-cuda.md, by their first column.
    """

    module: str
    title: str
    settles: tuple[str, ...] = ()


LINES: Mapping[str, Line] = {
    "versions": Line("setup", "Versions, the device and the flags that round float32 products"),
    "world": Line("setup", "One process, an in-memory store, nothing patched", ("one process", "no patches")),
    "precision": Line("accuracy", "Rotations while the program allows TF32", ("IEEE float32",)),
    "layers": Line(
        "accuracy",
        "Each method's adapted layers against float64 on the CPU",
        ("bf16 at full speed", "float32 gradients of bf16 factors", "small matrices"),
    ),
    "alibi": Line("accuracy", "Core attention with ALiBi against float64 on the CPU", ("ALiBi",)),
    "losses": Line(
        "training",
        "Ten losses of a two-layer Llama against those of the CPU",
        ("no patches", "Transformer Engine", "packed samples", "fused Adam", "bf16 at full speed"),
    ),
    "fusions": Line(
        "training",
        "Ten losses without each fused kernel",
        ("fused kernels", "fused cross entropy", "compiled kernels", "fused Adam"),
    ),
    "attention": Line(
        "training", "The kernels that --attention-backend chooses", ("torch's attention kernels", "attention backend")
    ),
    "recompute": Line(
        "training", "Dropout while activations are recomputed", ("dropout and recompute", "recomputed norms")
    ),
    "waits": Line(
        "training", "Where the host waits for the device", ("a step that does not wait", "lambda without a wait")
    ),
    "checkpoints": Line("training", "Checkpoints, written before and while training goes on"),
    "answers": Line("training", "Greedy answers and logits against transformers'", ("generation and scoring",)),
    "memory": Line(
        "speed",
        "Memory as the allocator counts it and as it is planned",
        ("memory metrics", "unused memory", "planned memory"),
    ),
    "layer-time": Line(
        "speed", "One layer of a 405B model as a rank of TP8 holds it", ("few kernels a layer", "bf16 at full speed")
    ),
    "rotations-time": Line("speed", "Blocks of rotations, and uRNN by Fourier transforms", ("small matrices",)),
    "model-speed": Line("speed", "LoRA on a model of 1B parameters", ("bf16 at full speed",)),
}


def function_of(name: str) -> str:
    """The function that measures a line: `check_layer_time` for layer-time."""
    return f"check_{name.replace('-', '_')}"
