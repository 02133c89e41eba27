# gpu_adam on NVIDIA GPUs. CuPy and NVRTC come as wheels, so the driver and NVIDIA's container toolkit are all the machine
# needs. From the repository's root:
#
#     docker build -f docker/cuda.Dockerfile -t gpu-adam:cuda .
#     docker run --rm -it --gpus all -v gpu-adam-cuda-cache:/var/cache/gpu_adam gpu-adam:cuda demo
#
# For a driver older than 580 replace cuda13 by cuda12, cuda13-math by cuda12-math.
# Each `pip install` stands on a line of its own: .ci/run takes these lines and runs them, too.
FROM python:3.12-slim AS package

# For the host device, which is there as well: the compiler of the base image's release, whatever its version.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Kernels are compiled at first use, into a volume that survives the container; CuPy keeps its own there, too.
ENV GPU_ADAM_CACHE=/var/cache/gpu_adam CUPY_CACHE_DIR=/var/cache/gpu_adam/cupy
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
# What the toolkit mounts of the driver: CUDA, and NVML for `gpu-adam info`.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --create-home adam && install -d -o adam -g adam /var/cache/gpu_adam /home/adam/gpu_adam
WORKDIR /home/adam/gpu_adam

COPY --chown=adam:adam LICENSE README.md pyproject.toml ./
COPY --chown=adam:adam cuda cuda
COPY --chown=adam:adam gpu_adam gpu_adam
RUN pip install -e ".[cuda13]"

VOLUME /var/cache/gpu_adam

# With the tests: docker build --target test ...
FROM package AS test
COPY --chown=adam:adam CHANGELOG.md CONTRIBUTING.md ./
COPY --chown=adam:adam .ci .ci
COPY --chown=adam:adam docker docker
COPY --chown=adam:adam profiling profiling
COPY --chown=adam:adam tests tests
RUN pip install -e ".[test,cuda13-math]"
USER 1000:1000
ENTRYPOINT ["pytest"]

# What a build without --target makes.
FROM package
USER 1000:1000
ENTRYPOINT ["gpu-adam"]
CMD ["demo"]
