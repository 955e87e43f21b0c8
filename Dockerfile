# syntax=docker/dockerfile:1
# CPU:   docker build -t megatron-peft .
# CUDA:  docker build -t megatron-peft:cuda --build-arg DEVICE=cuda .
# A CPU image needs no CUDA libraries: --build-arg PIP_EXTRA_INDEX_URL=... naming PyTorch's index of CPU wheels.
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS base-cpu
ENV EXTRAS=dev
# A compiler is not needed: every dependency has a wheel. make runs the demo and the tests.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04 AS base-cuda
ENV EXTRAS=dev,cuda
# Transformer Engine builds its PyTorch part against the installed torch: compiler, headers and git are needed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The tag is in the stages above.
# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG PIP_EXTRA_INDEX_URL
ENV OMP_NUM_THREADS=1 \
    OMP_WAIT_POLICY=PASSIVE \
    PATH=/workspace/megatron-peft/.venv/bin:${PATH}
RUN useradd --create-home --uid 10001 peft && install --directory --owner peft --group peft /workspace/megatron-peft
USER 10001
WORKDIR /workspace/megatron-peft

# The dependencies change less often than the code: they have a layer of their own.
COPY --chown=peft:peft pyproject.toml setup.py README.md LICENSE ./
COPY --chown=peft:peft megatron_peft/__init__.py megatron_peft/__init__.py
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir torch setuptools \
    && .venv/bin/pip install --no-cache-dir --no-build-isolation --editable ".[${EXTRAS}]"
COPY --chown=peft:peft . .
# The Makefile's stamp, newer than the files just copied.
RUN touch .venv/.installed

CMD ["make", "help"]
