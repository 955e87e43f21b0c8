"""The share of problems that one of k samples solves, estimated without bias from n samples of each."""

import numpy as np

from megatron_peft.config import require


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, hold one of its c correct ones:

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1..n} (1 - k / i)

    The product is what keeps large binomials out of it. Raises ConfigurationError for n below k: from fewer samples
    than k there is no unbiased estimate.
    """
    require(k >= 1, f"pass@{k} means nothing: k is at least 1.")
    require(
        num_samples >= k,
        f"pass@{k} needs at least {k} samples a problem, and there are {num_samples}: sample more (repeats: {k} in "
        "the task's file, --num-samples of tools/prepare_data.py), or ask for a smaller k.",
    )
    require(0 <= num_correct <= num_samples, f"{num_correct} correct samples of {num_samples} cannot be.")
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))
