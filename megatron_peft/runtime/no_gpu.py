"""Importing this hides the machine's GPUs, and the packages that need them, from this process and its children.

For processes that compute on a CPU by design: rehearsals, certificates, benchmarks, tests. It must come before torch
and megatron-core: CUDA keeps the number of GPUs that it was asked for once, forks share it, and megatron-core takes the
optimizers and norms of these packages wherever they are installed.
"""

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
for package in ("transformer_engine", "apex", "amp_C"):
    sys.modules[package] = None  # type: ignore[assignment]  # an import of it raises ImportError
