# syntax=docker/dockerfile:1
# The node as a small image: docker build -t mppnode .
# The tag is an argument so that an operator can pin a digest: --build-arg PYTHON=3.11-slim-bookworm@sha256:...
# 3.11 is the version the tests run on.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY channels channels
COPY mppnode mppnode
# There is no compiler here, and none is installed: every dependency publishes wheels for linux/amd64 and linux/arm64. One
# that does not should stop the build instead of being compiled by chance.
RUN python -m pip wheel --no-cache-dir --wheel-dir /wheels ".[postgres,stripe,jwt,otel]"
# A virtual environment without pip, filled from those wheels alone, is copied as one directory. Installing in the last stage
# would leave pip in it, and the wheels in a layer below.
RUN python -m venv --without-pip /opt/mppnode
RUN python -m pip --python /opt/mppnode/bin/python install --no-cache-dir --no-index --find-links /wheels "mppnode[postgres,stripe,jwt,otel]"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="mppnode" \
      org.opencontainers.image.description="An inference node that is paid by the token" \
      org.opencontainers.image.licenses="MIT"
# The base image has pip; a node that was broken into need not have it too.
RUN python -m pip uninstall --yes --quiet pip setuptools wheel
# All state is here, so the root file system may be mounted read-only. 0700: the spool holds payers' signatures.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/mppnode
COPY --from=build /opt/mppnode /opt/mppnode
# Bytecode was written at installation; nothing could be written beside it later. Log lines must not wait in a buffer.
ENV PATH=/opt/mppnode/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number: Kubernetes' runAsNonRoot cannot look a name up, and the number owns the volume wherever it is mounted.
USER 10001:10001
VOLUME /var/lib/mppnode
WORKDIR /var/lib/mppnode
EXPOSE 8402 8404
# The node drains on SIGTERM. Exec form below, so that it is process 1 and gets the signal: a shell would keep it.
STOPSIGNAL SIGTERM
# /healthz, not /readyz: a node that drains or waits for its database is not ready, but a restart would not help it.
# http.client and not urllib, which would ask a proxy named in the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8402, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["mppnode"]
CMD ["serve", "--config", "/etc/mppnode/mppnode.toml"]
