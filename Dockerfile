# docker build --target cpu  --tag latentmill:0.1.0-cpu .
# docker build --target cuda --tag latentmill:0.1.0 .                             for NVIDIA's drivers of CUDA 13
# docker build --target cuda --tag latentmill:0.1.0-root --build-arg RUN_AS=0 .   for SkyPilot, which wants root in it
#
# Ray, latentmill, and the plugins shapes, diffusers and filters, in the versions of constraints.txt. There is no entry point:
# KubeRay and SkyPilot start Ray by commands of their own. Needs BuildKit, or buildah or podman.

FROM python:3.11-slim-bookworm AS base
# wget and bash: the probes of KubeRay before 1.6. procps: to look around by hand.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash latentmill \
    && install --directory --owner=latentmill --group=latentmill /cache /work
# Packages lie in /usr/local, which is on the path of a login shell, too. Models and latentmill's own caches lie in /cache.
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface
WORKDIR /work
CMD ["latentmill", "--help"]

FROM base AS wheels
COPY pyproject.toml README.md LICENSE /source/
COPY framework /source/framework
COPY conf /source/conf
COPY jobs /source/jobs
COPY plugins /source/plugins
RUN cd /source && pip wheel --no-deps --wheel-dir /wheels . plugins/shapes plugins/diffusers plugins/filters plugins/comfy

FROM base AS cpu
COPY constraints.txt /
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' /constraints.txt)"
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --constraint /constraints.txt /wheels/latentmill-*.whl /wheels/latentmill_*.whl obstore huggingface-hub
VOLUME /cache
ARG RUN_AS=1000
USER $RUN_AS

FROM base AS cuda
COPY constraints.txt /
# torch of PyPI is built for CUDA and brings its libraries, in a layer of gigabytes that a change of ours leaves as it is.
RUN pip install --constraint /constraints.txt torch
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --constraint /constraints.txt /wheels/latentmill-*.whl /wheels/latentmill_*.whl obstore huggingface-hub
# NVIDIA's container toolkit puts the driver of the node there.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
ARG RUN_AS=1000
USER $RUN_AS
