# gpu_adam on processors. From the repository's root:
#
#     docker build -f docker/cpu.Dockerfile -t gpu-adam .
#     docker run --rm -it -v gpu-adam-cache:/var/cache/gpu_adam gpu-adam demo
#
# Each `pip install` stands on a line of its own: .ci/run takes these lines and runs them, too.
FROM python:3.12-slim AS package

# The compiler of the base image's release, whatever its version.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Kernels are compiled at first use, into a volume that survives the container.
ENV GPU_ADAM_CACHE=/var/cache/gpu_adam PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home adam && install -d -o adam -g adam /var/cache/gpu_adam /home/adam/gpu_adam \
    /run/gpu_adam /var/lib/gpu_adam
WORKDIR /home/adam/gpu_adam

COPY --chown=adam:adam LICENSE README.md pyproject.toml ./
COPY --chown=adam:adam cuda cuda
COPY --chown=adam:adam gpu_adam gpu_adam
RUN pip install -e .

VOLUME /var/cache/gpu_adam

# With the tests: docker build --target test ...
FROM package AS test
COPY --chown=adam:adam CHANGELOG.md CONTRIBUTING.md ./
COPY --chown=adam:adam .ci .ci
COPY --chown=adam:adam docker docker
COPY --chown=adam:adam profiling profiling
COPY --chown=adam:adam tests tests
RUN pip install -e ".[test]"
USER 1000:1000
ENTRYPOINT ["pytest"]

# With the control plane: docker build --target service ...
FROM package AS service
RUN pip install -e ".[serve]"
USER 1000:1000
ENTRYPOINT ["gpu-adam"]
CMD ["serve", "--help"]

# What a build without --target makes.
FROM package
USER 1000:1000
ENTRYPOINT ["gpu-adam"]
CMD ["demo"]
