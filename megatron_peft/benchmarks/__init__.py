# The benchmarks of `registry`, which imports torch: a wrong name is answered without it.
NAMES = (
    "lora-ratio",
    "hybrid-ratio",
    "boft-layer",
    "activations",
    "collectives",
    "lora-full",
    "hybrid-full",
    "rotations",
    "lora-ga-start",
    "logits",
    "loading",
    "convert",
    "urnn-crossover",
    "generation",
    "harness",
    "startup",
)
