"""Compares the pinned versions of the CUDA image, pins.toml, with what the package index says of them.

    python -m tools.cuda.pins

Nothing is installed. The program names what does not fit and exits with code 1. Apex is not in the index: its tag,
which the Dockerfile reads, is not compared.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.cuda.index import File, files

PINS = Path(__file__).with_name("pins.toml")
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
BACKENDS = "transformer_engine/pytorch/attention/dot_product_attention/utils.py"
CUDNN_FOR_PACKING = Version("9.6")  # on sm 90, for queries that share a key head
CUDA_PACKAGES = re.compile(r"cuda-toolkit|nvidia-cuda-runtime(-cu\d+)?")


@dataclass(frozen=True)
class Pins:
    """pins.toml, read."""

    base: str
    cuda: str
    python: str
    packages: Mapping[str, Version]

    @classmethod
    def read(cls, path: Path = PINS) -> "Pins":
        """From the file."""
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        packages = {name: Version(version) for name, version in table["packages"].items()}
        return cls(**table["image"], packages=packages)

    @property
    def tags(self) -> frozenset[str]:
        """Of wheels that fit the image."""
        python = tuple(map(int, self.python.split(".")))
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)] + ["manylinux2014_x86_64"]
        interpreter = f"cp{''.join(map(str, python))}"
        tags = [*cpython_tags(python, platforms=platforms), *compatible_tags(python, interpreter, platforms)]
        return frozenset(map(str, tags))

    @property
    def environment(self) -> dict[str, str]:
        """What a requirement's marker reads, in the image."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "sys_platform": "linux",
            "extra": "",
        }

    def file(self, listed: list[File], package: str) -> File | None:
        """The file that pip takes for the pinned version: a wheel that fits, else the sdist; None if there is none."""
        pinned = [file for file in listed if file.version == self.packages[package] and not file.yanked]
        admitted = [file for file in pinned if self.python in SpecifierSet(file.requires_python)]
        wheels = [file for file in admitted if file.tags & self.tags]
        return next(iter(wheels + [file for file in admitted if not file.tags]), None)


def misfits(pins: Pins, chosen: Mapping[str, File | None], requirements: Mapping[str, list[Requirement]]) -> list[str]:
    """What is wrong with the pins, given the files and requirements of the pinned packages."""
    found = [
        f"{name} {pins.packages[name]}: the index has no file for Python {pins.python} on Linux"
        for name, file in chosen.items()
        if file is None
    ]
    for name, needs in requirements.items():
        for need in needs:
            pin = pins.packages.get(canonicalize_name(need.name))
            applies = need.marker is None or need.marker.evaluate(pins.environment)
            if applies and pin is not None and not need.specifier.contains(pin, prereleases=True):
                found.append(f"{name} {pins.packages[name]} needs {need}, but {need.name} is pinned to {pin}")
    return found + list(_cuda_misfits(pins, requirements["torch"]))


def _cuda_misfits(pins: Pins, torch_needs: list[Requirement]) -> Iterator[str]:
    for need in torch_needs:
        version = _exact(need)
        if CUDA_PACKAGES.fullmatch(need.name) and version and _minor(version) != pins.cuda:
            yield f"torch {pins.packages['torch']} is built with CUDA {_minor(version)}, the image has {pins.cuda}"
        if need.name.startswith("nvidia-cudnn-") and version and version < CUDNN_FOR_PACKING:
            yield f"torch brings cuDNN {version}, which cannot attend to packed samples: {CUDNN_FOR_PACKING} can"
    if not any(CUDA_PACKAGES.fullmatch(need.name) for need in torch_needs):
        yield f"torch {pins.packages['torch']} does not say which CUDA it was built with"
    if not pins.base.startswith(f"nvidia/cuda:{pins.cuda}."):
        yield f"the image {pins.base} is not of CUDA {pins.cuda}"
    core = f"transformer-engine-cu{pins.cuda.split('.')[0]}"
    if core not in pins.packages:
        yield f"CUDA {pins.cuda} needs {core}, which is not pinned"


def flash_attn_misfit(pin: Version, backends: str) -> str:
    """Why this Transformer Engine leaves flash-attn unused, or "".

    Args:
        backends: the text of its BACKENDS.
    """
    limits = dict(re.findall(r'\b(version_required|max_version) = PkgVersion\("([^"]+)"\)', backends))
    least, most = Version(limits["version_required"]), Version(limits["max_version"])
    excludes = "version < FlashAttentionUtils.max_version" in backends
    fits = least <= pin and (pin < most if excludes else pin <= most)
    return "" if fits else f"flash-attn {pin} is ignored: it takes {least} to {most}{' (excluded)' * excludes}"


def project_misfits(pins: Pins, project: Mapping[str, Any]) -> list[str]:
    """Pins outside the ranges of pyproject.toml."""
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["cuda"], *extras["flash-attn"]]
    wanted: dict[str, Any] = {canonicalize_name(need.name): need.specifier for need in map(Requirement, needs)}
    return [
        f"pyproject.toml wants {name}{wanted[name]}, the pin is {version}"
        for name, version in pins.packages.items()
        if name in wanted and version not in wanted[name]
    ]


def _exact(need: Requirement) -> Version | None:
    exact = [Version(clause.version) for clause in need.specifier if clause.operator == "=="]
    return exact[0] if exact else None


def _minor(version: Version) -> str:
    return f"{version.major}.{version.minor}"


def main() -> int:
    """Ask the index, print a table and what does not fit."""
    pins = Pins.read()
    chosen = {name: pins.file(files(name), name) for name in pins.packages}
    for name, file in chosen.items():
        kind = "none" if file is None else "wheel" if file.tags else "sdist, compiled"
        print(f"{name:26s} {pins.packages[name]!s:12s} {kind}")
    # An sdist's own requirements are known once it is built; those of these two are torch and the pinned core library.
    requirements = {name: file.requirements() for name, file in chosen.items() if file is not None and file.tags}
    found = misfits(pins, chosen, requirements)
    engine = chosen["transformer-engine"]
    if engine is not None:
        found += filter(None, [flash_attn_misfit(pins.packages["flash-attn"], engine.sources()[BACKENDS])])
    found += project_misfits(pins, tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])
    print("\n".join(found) or f"all fit Python {pins.python} and CUDA {pins.cuda}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
