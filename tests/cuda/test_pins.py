"""The pinned versions of the CUDA image: what is found wrong with them, and that the Dockerfile installs these."""

import re
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.cuda.index import File
from tools.cuda.pins import PINS as TABLE
from tools.cuda.pins import PROJECT, Pins, flash_attn_misfit, misfits, project_misfits

ROOT = Path(__file__).parents[2]
PINS = Pins.read()
PROJECT_TABLE = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
# What the index said of the pinned versions on the day that they were chosen.
NEEDS = {
    "torch": ['cuda-toolkit[cudart]==13.0.3; platform_system == "Linux"', "nvidia-cudnn-cu13==9.20.0.48"],
    "transformer-engine": ['transformer-engine-torch==2.20.2; extra == "pytorch"'],
}
WHEEL = File("x.whl", "", Version("1"), frozenset({"py3-none-any"}), "", False)
INCLUDED = 'version_required = PkgVersion("2.1.1")\nmax_version = PkgVersion("2.8.3")\nversion <= max_version'
EXCLUDED = INCLUDED.replace("2.8.3", "2.8.4") + "\nversion < FlashAttentionUtils.max_version"


def found(pins: Pins, needs: dict[str, list[str]], **chosen: File | None) -> list[str]:
    parsed = {name: [Requirement(line) for line in lines] for name, lines in needs.items()}
    return misfits(pins, {name: chosen.get(name.replace("-", "_"), WHEEL) for name in pins.packages}, parsed)


def test_the_pins_fit_what_the_index_said_of_them():
    assert not found(PINS, NEEDS)


@pytest.mark.parametrize(
    ("changed", "needs", "problem"),
    [
        (
            {},
            {"torch": ["nvidia-cuda-runtime-cu12==12.8.90"]},
            "torch 2.13.0 is built with CUDA 12.8, the image has 13.0",
        ),
        ({}, {"torch": ["numpy"]}, "does not say which CUDA"),
        ({}, {"torch": [NEEDS["torch"][0], "nvidia-cudnn-cu13==9.5.1"]}, "cuDNN 9.5.1, which cannot attend to packed"),
        (
            {"base": "nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04"},
            NEEDS,
            "12.8.1-cudnn-devel-ubuntu24.04 is not of CUDA 13.0",
        ),
        ({"cuda": "12.8"}, NEEDS, "needs transformer-engine-cu12, which is not pinned"),
        ({}, {**NEEDS, "megatron-core": ["torch>=2.14"]}, "needs torch>=2.14, but torch is pinned to 2.13.0"),
    ],
)
def test_what_does_not_fit_is_named(changed, needs, problem):
    assert any(problem in line for line in found(replace(PINS, **changed), needs))


def test_a_version_that_the_index_lacks_is_named():
    assert found(PINS, NEEDS, flash_attn=None) == [
        "flash-attn 2.8.3.post2: the index has no file for Python 3.12 on Linux"
    ]


def test_the_file_fits_python_and_platform_and_is_not_withdrawn():
    torch = PINS.packages["torch"]
    fits = File("fits", "", torch, frozenset({"cp312-cp312-manylinux_2_28_x86_64"}), ">=3.10", False)
    sdist = replace(fits, name="sdist", tags=frozenset())
    unfit = [
        replace(fits, tags=frozenset({"cp311-cp311-manylinux_2_28_x86_64"})),
        replace(fits, tags=frozenset({"cp312-cp312-win_amd64"})),
        replace(fits, requires_python=">=3.13"),
        replace(fits, yanked=True),
        replace(fits, version=Version("2.12")),
    ]
    assert PINS.file([*unfit, sdist, fits], "torch") == fits
    assert PINS.file([*unfit, sdist], "torch") == sdist
    assert PINS.file(unfit, "torch") is None


def test_transformer_engine_ignores_a_flash_attn_beyond_its_limit():
    """2.8.3.post2 is newer than 2.8.3, the limit of Transformer Engine 2.10 to 2.18."""
    pin = PINS.packages["flash-attn"]
    assert "is ignored: it takes 2.1.1 to 2.8.3" in flash_attn_misfit(pin, INCLUDED)
    assert not flash_attn_misfit(pin, EXCLUDED)
    assert "2.8.4 (excluded)" in flash_attn_misfit(Version("2.8.4"), EXCLUDED)
    assert not flash_attn_misfit(Version("2.8.3"), INCLUDED)


def test_a_torch_without_the_products_of_bf16_adapters_is_not_installed():
    """`out_dtype` of mm and bmm came with 2.8; on a GPU every adapter in bf16 calls them."""
    [torch] = [need for need in map(Requirement, PROJECT_TABLE["dependencies"]) if need.name == "torch"]
    assert [release for release in ("2.6.0", "2.7.1", "2.8.0") if release in torch.specifier] == ["2.8.0"]


def test_pins_lie_within_the_ranges_of_the_project():
    assert not project_misfits(PINS, PROJECT_TABLE)
    older = replace(PINS, packages={**PINS.packages, "transformer-engine": Version("2.3")})
    assert project_misfits(older, PROJECT_TABLE) == ["pyproject.toml wants transformer-engine<3,>=2.4, the pin is 2.3"]


def test_the_dockerfile_starts_from_the_pinned_image_and_has_the_libraries_of_infiniband():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stage = text.partition("AS base-cpu")[2].partition("FROM base-${DEVICE}")[0]
    assert f"FROM {PINS.base} AS base-cuda" in stage
    assert "COPY tools/cuda/pins.toml /opt/pins.toml" in stage and "PIP_CONSTRAINT=" in stage
    assert all(name in stage.split() for name in ("libibverbs1", "ibverbs-providers", "rdma-core"))
    assert text.rstrip().rpartition("\nUSER ")[2].startswith("10001\n")


def test_the_dockerfile_takes_apex_at_the_pinned_tag():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r'--branch "\$\((.*)\)"', text)
    command = command.replace("/opt/pins.toml", str(TABLE))
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert found.split() == [tomllib.loads(TABLE.read_text(encoding="utf-8"))["apex"]["tag"]]
