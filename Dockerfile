# syntax=docker/dockerfile:1
# CPU:   docker build -t megatron-peft .         or `make image`, which needs neither docker nor a registry
# CUDA:  docker build -t megatron-peft:cuda --build-arg DEVICE=cuda .
# A CPU image needs no CUDA libraries: --build-arg PIP_EXTRA_INDEX_URL=... naming PyTorch's index of CPU wheels.
# EXTRAS=dev,... adds what `make test` needs.
ARG DEVICE=cpu
ARG CPU_BASE=debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${CPU_BASE} AS base-cpu
ARG EXTRAS=demo,eval,report
ENV EXTRAS=${EXTRAS}
# A compiler is not needed: every dependency has a wheel. make runs the demo and the tests.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Versions that exist together: tools/cuda/pins.toml, which `python -m tools.cuda.pins` compares with the package index.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS base-cuda
ARG EXTRAS=test,cuda,flash-attn
ENV EXTRAS=${EXTRAS} \
    PIP_CONSTRAINT=/opt/constraints.txt
# Transformer Engine, flash-attn and Apex are compiled against the installed torch: compiler, headers and git are needed.
# NCCL reaches InfiniBand through libibverbs and its drivers; without them it would use sockets.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ git ibverbs-providers libibverbs1 make ninja-build python3 python3-dev python3-venv rdma-core \
    && rm -rf /var/lib/apt/lists/*
COPY tools/cuda/pins.toml /opt/pins.toml
RUN python3 -c "import tomllib; [print(f'{name}=={version}') for name, version in \
    tomllib.load(open('/opt/pins.toml', 'rb'))['packages'].items()]" > "${PIP_CONSTRAINT}"

# The tag is in the stages above.
# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG PIP_EXTRA_INDEX_URL
ARG APEX=""
# Fewer of flash-attn's files at a time than cores: each takes several gigabytes.
ARG MAX_JOBS=4
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
    && .venv/bin/pip install --no-cache-dir torch packaging psutil setuptools wheel \
    && .venv/bin/pip install --no-cache-dir --no-build-isolation --editable ".[${EXTRAS}]"
RUN if [ -n "${APEX}" ]; then \
    git clone --depth 1 --branch "$(sed -n 's/^tag = "\(.*\)"/\1/p' /opt/pins.toml)" \
        https://github.com/NVIDIA/apex /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 .venv/bin/pip install --no-cache-dir --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex; fi
COPY --chown=peft:peft . .
# The Makefile's stamps, newer than the files just copied.
RUN touch .venv/.installed \
    && case ",${EXTRAS}," in *,test,* | *,dev,*) touch .venv/.test-installed ;; esac

CMD ["make", "help"]
