# sslcells in a container, for CPUs or GPUs.
#
#   docker build -t sslcells .                              a plain Python; torch as pip has it, which is for CUDA too
#   docker build -t sslcells --build-arg BASE=IMAGE .       IMAGE has Python 3.11 or newer; a torch in it is kept
#   docker build -t sslcells --build-arg TORCH_INDEX=URL .  the smaller torch for CPUs, from the index that PyTorch names
#
#   docker run --rm sslcells doctor
#   docker run --rm --gpus all --shm-size=8g -v "$PWD:/work" sslcells train --config folder data.path=cells name=mine
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG TORCH_INDEX=
ARG EXTRAS=sources,zarr
# In some base images pip refuses to touch the system's Python, which nothing else uses here.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY launch /src/launch
COPY slurm /src/slurm
COPY docs/cluster.md /src/docs/cluster.md
COPY sslcells /src/sslcells
RUN if [ -n "$TORCH_INDEX" ]; then pip install torch torchvision --index-url "$TORCH_INDEX"; fi \
    && pip install "/src[$EXTRAS]" \
    && rm -rf /src

# Caches need a home that any user may write to: `docker run --user "$(id -u)"` makes the files that it writes yours.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["sslcells"]
CMD ["--help"]
