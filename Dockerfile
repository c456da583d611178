# Three images of one project. `trainer` (the last stage, so the default): agent and trainer, what every pod of a run is. `slim`: CLI and driver, without torch.
# `ray`: the trainer with Ray, for pods of `osctl prepare run --engine ray --cluster`; a layer of 0.9 GB more.
#   docker build -t REGISTRY/osctl-trainer --build-arg REVISION=$(git rev-parse HEAD) .
#   docker build -t REGISTRY/osctl --target slim --build-arg REVISION=$(git rev-parse HEAD) .
# BASE is any Debian-like image with Python >= 3.11 and its venv module, and with ca-certificates. The default is a tag: give a digest where builds must repeat.
# Certificates are the base's; package indexes come from /etc/pip.conf and /etc/uv/uv.toml, which a build may mount: nothing of them stays in the image.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS tools
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet "uv>=0.9,<1"

# Lists of locked versions with hashes. The heavy layers below are built from these alone: a change of pyproject.toml that locks the same rebuilds none.
FROM tools AS locked
WORKDIR /src
COPY pyproject.toml uv.lock ./
RUN mkdir /locked && export="/opt/uv/bin/uv export --quiet --frozen --no-default-groups --no-emit-project --no-header" && \
    $export --output-file /locked/trainer.txt && $export --extra ray --output-file /locked/ray.txt && \
    $export --prune torch --prune einops --prune safetensors --prune av --prune fsspec --prune s3fs --prune diffusers --prune transformers --prune sentencepiece --prune opencv-python-headless --prune imagehash --prune py3langid --output-file /locked/slim.txt && \
    touch -d @0 /locked/*.txt /locked

# The project alone, as it will lie in the images' environment: the one layer that a change of code makes anew.
FROM tools AS project
ARG UV_CACHE_DIR=/var/cache/uv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY opensora opensora
COPY orchestrator orchestrator
RUN --mount=type=cache,target=/var/cache/uv \
    export UV_NATIVE_TLS=1 UV_LINK_MODE=copy PATH=/opt/uv/bin:$PATH && uv build --quiet --wheel --out-dir /dist && \
    uv venv --quiet --python "$(command -v python3)" /opt/osctl && uv pip install --quiet --no-deps --python /opt/osctl /dist/*.whl && \
    /opt/osctl/bin/python -m compileall -q /opt/osctl/lib/python3.*/site-packages && \
    cd /opt/osctl && mkdir /project && cp -a --parents bin/osctl lib/python3.*/site-packages/opensora lib/python3.*/site-packages/orchestrator lib/python3.*/site-packages/osctl-*.dist-info /project

FROM ${BASE} AS base
RUN groupadd --gid 1000 osctl && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin osctl
ENV PATH=/opt/osctl/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# uv is installed and removed within the layer: a stage's files can be mounted into another by BuildKit, but not reliably by older buildah.
FROM base AS slim-dependencies
ARG UV_CACHE_DIR=/var/cache/uv
COPY --from=locked /locked/slim.txt /opt/osctl/requirements.txt
RUN --mount=type=cache,target=/var/cache/uv \
    export UV_NATIVE_TLS=1 UV_LINK_MODE=copy && python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet "uv>=0.9,<1" && \
    /tmp/uv/bin/uv venv --quiet --allow-existing --python "$(command -v python3)" /opt/osctl && \
    /tmp/uv/bin/uv pip install --quiet --python /opt/osctl --require-hashes --compile-bytecode --requirements /opt/osctl/requirements.txt && rm -r /tmp/uv

FROM base AS trainer-dependencies
ARG UV_CACHE_DIR=/var/cache/uv
COPY --from=locked /locked/trainer.txt /opt/osctl/requirements.txt
RUN --mount=type=cache,target=/var/cache/uv \
    export UV_NATIVE_TLS=1 UV_LINK_MODE=copy && python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet "uv>=0.9,<1" && \
    /tmp/uv/bin/uv venv --quiet --allow-existing --python "$(command -v python3)" /opt/osctl && \
    /tmp/uv/bin/uv pip install --quiet --python /opt/osctl --require-hashes --compile-bytecode --requirements /opt/osctl/requirements.txt && rm -r /tmp/uv

FROM trainer-dependencies AS ray-dependencies
ARG UV_CACHE_DIR=/var/cache/uv
COPY --from=locked /locked/ray.txt /opt/osctl/ray.txt
RUN --mount=type=cache,target=/var/cache/uv \
    export UV_NATIVE_TLS=1 UV_LINK_MODE=copy && python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet "uv>=0.9,<1" && \
    /tmp/uv/bin/uv pip install --quiet --python /opt/osctl --require-hashes --compile-bytecode --requirements /opt/osctl/ray.txt && rm -r /tmp/uv

FROM ray-dependencies AS ray
COPY --from=project /project/ /opt/osctl/
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["python", "-P", "-m", "orchestrator.agent"]
ARG SOURCE=""
ARG REVISION=""
ARG VERSION=""
LABEL org.opencontainers.image.title=osctl-ray org.opencontainers.image.description="osctl: agent and trainer, with Ray" org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=${SOURCE} org.opencontainers.image.revision=${REVISION} org.opencontainers.image.version=${VERSION}

FROM slim-dependencies AS slim
COPY --from=project /project/ /opt/osctl/
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["osctl"]
ARG SOURCE=""
ARG REVISION=""
ARG VERSION=""
LABEL org.opencontainers.image.title=osctl org.opencontainers.image.description="osctl: CLI and driver" org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=${SOURCE} org.opencontainers.image.revision=${REVISION} org.opencontainers.image.version=${VERSION}

FROM trainer-dependencies AS trainer
COPY --from=project /project/ /opt/osctl/
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["python", "-P", "-m", "orchestrator.agent"]
ARG SOURCE=""
ARG REVISION=""
ARG VERSION=""
LABEL org.opencontainers.image.title=osctl-trainer org.opencontainers.image.description="osctl: agent and trainer" org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.source=${SOURCE} org.opencontainers.image.revision=${REVISION} org.opencontainers.image.version=${VERSION}
