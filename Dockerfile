# hvd-lb with a Horovod (NCCL, Gloo, MPI) built for its torch. CUDA comes with torch; the host brings the driver.
#
#   docker build -t hvd-lb .
#   docker run --rm hvd-lb doctor
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" \
#       -v /data/imagenet:/data/imagenet:ro -v "$PWD/runs:/work/runs" hvd-lb train --data /data/imagenet --gpus 8
#
# BASE_IMAGE: Debian bookworm, with Python 3.11 or newer or without; without, the distribution's is installed.
# Stages: `libraries` has what hvd-lb stands on and changes seldom, `package` hvd-lb itself; the image takes one layer
# from each, so that a new hvd-lb on the same libraries is a download of a megabyte. See docs/image.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS tools
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
WORKDIR /src

# By itself, so that libraries are installed anew when these change, and not with every edit of setup.cfg.
FROM tools AS requirements
COPY setup.cfg ./
RUN python -c 'import configparser as c; s = c.ConfigParser(); s.read("setup.cfg"); print(s["options"]["install_requires"], s["options.extras_require"]["remote"])' \
        > /requirements.txt

FROM tools AS libraries
COPY --from=requirements /requirements.txt /
RUN pip install --requirement /requirements.txt
COPY docker/build-horovod.sh docker/horovod_parts.py docker/horovod.patch docker/
# hadolint ignore=DL3013
RUN wheel=$(HVD_LB_CACHE=/tmp/hvd-lb docker/build-horovod.sh /opt/hvd-lb/bin/python) \
    && pip install "$wheel" \
    && rm -r /tmp/hvd-lb
# Nothing is compiled or linked in the image: no need for the wheels' headers and static libraries (270 MB).
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && find "$site" -depth \( -type d -name include ! -execdir test -e {}/__init__.py \; -o -name '*.a' \) -exec rm -r {} +

FROM libraries AS package
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY hvd_lb hvd_lb/
COPY cli cli/
RUN pip install --no-deps --root /package .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Whatever uid a container is run as, it needs an account for ssh: /var/lib/extrausers/passwd holds it, of which the
# system takes ids from 500 up only, and no setuid program is left that could make use of another one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnss-extrausers openmpi-bin openssh-client openssh-server \
    && if ! command -v python3; then apt-get install --yes --no-install-recommends python3; fi \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /etc/ssh/ssh_host_* \
    && sed -i 's/^\(passwd:.*\)$/\1 extrausers/' /etc/nsswitch.conf \
    && echo 'hvd-lb:x:1000:1000:hvd-lb:/home/hvd-lb:/bin/bash' > /var/lib/extrausers/passwd \
    && chmod 0666 /var/lib/extrausers/passwd \
    && mkdir -p /run/sshd /work \
    && mkdir -m 1777 /home/hvd-lb \
    && chmod 1777 /work \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY docker/sshd.conf /etc/ssh/sshd_config.d/hvd-lb.conf
COPY docker/ssh.conf /etc/ssh/ssh_config.d/hvd-lb.conf
COPY docker/entry.sh /usr/local/bin/hvd-lb-entry
COPY --from=libraries /opt/hvd-lb /opt/hvd-lb
# The driver is mounted where the loader finds it, but for clusters (GKE) that mount it as /usr/local/nvidia.
ENV PATH=/opt/hvd-lb/bin:$PATH:/usr/local/nvidia/bin LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    HOME=/home/hvd-lb NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=package /package /
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["hvd-lb-entry", "hvd-lb"]
CMD ["--help"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hvd-lb" \
      org.opencontainers.image.description="Train image models with very large minibatches on many GPUs without losing accuracy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
