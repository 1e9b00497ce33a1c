# Train in a container.
#
#     docker build --tag audio-dendrites .                                     # CPU
#     docker build --tag audio-dendrites --build-arg TORCH_BACKEND=cu130 .     # NVIDIA GPUs
#     docker run --rm --volume audio-dendrites-runs:/app/runs audio-dendrites configs/quickstart.yaml
#
# On GPUs add `--gpus all --ipc=host`; on a CPU `--env OMP_NUM_THREADS=8`, since accelerate gives a process one thread.
FROM python:3.12-slim

# uv's name for one of PyTorch's indexes, from which torch, torchaudio and torchvision then all come.
# Empty: PyPI's wheels, which are CUDA builds. They bring CUDA with them, so the base image is the same.
ARG TORCH_BACKEND=cpu

ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    UV_LINK_MODE=copy

# Debian keeps only the newest version of a package, so a pin would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.8

WORKDIR /app

# The libraries depend on these files alone, so a change of the code does not install them again.
COPY Makefile pyproject.toml requirements.txt README.md LICENSE ./
COPY audio_dendrites/__init__.py audio_dendrites/
RUN --mount=type=cache,target=/root/.cache/uv \
    ${TORCH_BACKEND:+env UV_TORCH_BACKEND="$TORCH_BACKEND"} make install

COPY . .

RUN useradd --create-home --uid 1000 app \
    && install --directory --owner app runs data "$HF_HOME"
USER 1000
VOLUME ["/app/runs", "/app/data", "/cache/huggingface"]

ENTRYPOINT ["accelerate", "launch", "train.py"]
CMD ["configs/quickstart.yaml"]
