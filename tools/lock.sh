#!/bin/bash
# The versions that `make install`, `make test` and `make lint` install, as requirements/*.txt, with hashes:
#
#     tools/lock.sh UV    the newest in the ranges of pyproject.toml, for every Python that we take, by the program uv
#
# test.txt and lint.txt have what install.txt lacks, each by itself. What an index gives of torch is a build for CPUs or
# one for CUDA, and that decides what else it needs: requirements/torch.txt, which is written by hand, has its version
# alone, and the others leave out what only torch brings.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
uv=$1
rest=(--constraints torch.txt)

lock() { # NAME SOURCE [--extra NAME]...
    "$uv" pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes --no-annotate --no-header \
        --output-file "$1.txt" "${rest[@]}" "${@:2}" >/dev/null
    sed -i -E '/^(torch|triton|nvidia-.*|cuda-.*)==/,/[^\\]$/d' "$1.txt"
    rest+=(--constraints "$1.txt")
}

lock build - <<<"setuptools>=77" # builds what comes as source
lock install ../pyproject.toml --extra demo --extra eval --extra report
while read -r package; do rest+=(--no-emit-package "$package"); done < <(sed -n 's/==.*//p' install.txt)
lock test ../pyproject.toml --extra test
lock lint ../pyproject.toml --extra lint
