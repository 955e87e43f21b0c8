"""`full_precision`: torch's settings inside, the program's own outside."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_peft.runtime.precision import full_precision

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def settings() -> tuple[str, str, str, bool, bool]:
    """For all backends ("mixed" where torch refuses to say), of each, and the two reductions."""
    try:
        for_all = torch.get_float32_matmul_precision()
    except RuntimeError:
        for_all = "mixed"
    reductions = CUDA.allow_bf16_reduced_precision_reduction, CUDA.allow_fp16_reduced_precision_reduction
    return for_all, CUDA.fp32_precision, MKLDNN.fp32_precision, *reductions


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = MKLDNN.fp32_precision = torch.backends.fp32_precision = "none"
    CUDA.allow_bf16_reduced_precision_reduction = CUDA.allow_fp16_reduced_precision_reduction = True


def assert_full_precision() -> None:
    for_all, *for_each, bf16, fp16 = settings()
    assert for_all == "highest" and not bf16 and not fp16
    assert not {"tf32", "bf16"} & {*for_each}
    assert not CUDA.allow_tf32  # raises where torch finds its two settings at odds


PROGRAMS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(MKLDNN, "fp32_precision", "bf16"),
    "every backend": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "no reduction": lambda: setattr(CUDA, "allow_bf16_reduced_precision_reduction", (False, False)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_settings_hold_inside_and_are_given_back(program: str) -> None:
    PROGRAMS[program]()
    before = settings()
    with full_precision:
        assert_full_precision()
        with full_precision:
            pass
        assert_full_precision()
    assert settings() == before


def test_settings_hold_in_backward_and_are_given_back_after_an_error() -> None:
    seen, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(settings()))
    torch.set_float32_matmul_precision("high")
    before = settings()

    @full_precision
    def fails() -> None:
        assert_full_precision()
        x.sum().backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert settings() == before and [for_all for for_all, *_ in seen] == ["highest"]


def test_the_last_of_two_threads_gives_them_back() -> None:
    torch.set_float32_matmul_precision("high")
    before, is_in, may_leave = settings(), threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision:
            is_in.set()
            may_leave.wait(10)

    other = threading.Thread(target=stay)
    with full_precision:
        other.start()
        assert is_in.wait(10)
    assert_full_precision()
    may_leave.set()
    other.join()
    assert settings() == before


def test_what_container_images_set_is_overruled() -> None:
    program = "import torch; from megatron_peft.runtime.precision import full_precision as full\n"
    program += "matmul = torch.backends.cuda.matmul; print(matmul.allow_tf32)\n"
    program += "with full: print(matmul.allow_tf32)\nprint(matmul.allow_tf32)"
    environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
