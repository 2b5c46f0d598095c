# hvd-lb with a Horovod (NCCL, Gloo, MPI) built for its torch. CUDA comes with torch; the host brings the driver.
#
#   docker build -t hvd-lb .
#   docker run --rm --gpus all --shm-size 8g -v /data/imagenet:/data -v "$PWD/runs:/work/runs" hvd-lb train --gpus 8
#
# BASE_IMAGE: any Debian or Ubuntu with or without Python; without, the distribution's (3.11 or newer) is installed.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libopenmpi-dev make openmpi-bin \
    && if ! command -v python3; then \
           apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; \
       fi \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hvd-lb
ENV PATH=/opt/hvd-lb/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# From what changes seldom to what changes often: libraries, Horovod, hvd-lb itself.
WORKDIR /src
COPY setup.cfg ./
RUN python -c 'import configparser as c; s = c.ConfigParser(); s.read("setup.cfg"); print(s["options"]["install_requires"])' \
        > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt
COPY docker/build-horovod.sh docker/horovod_parts.py docker/
# hadolint ignore=DL3013
RUN wheel=$(HVD_LB_CACHE=/tmp/hvd-lb docker/build-horovod.sh /opt/hvd-lb/bin/python) \
    && pip install "$wheel" \
    && rm -r /tmp/hvd-lb
COPY . .
RUN pip install --no-deps .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openmpi-bin \
    && if ! command -v python3; then apt-get install --yes --no-install-recommends python3; fi \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/hvd-lb /opt/hvd-lb
ENV PATH=/opt/hvd-lb/bin:$PATH
WORKDIR /work
ENTRYPOINT ["hvd-lb"]
CMD ["--help"]
