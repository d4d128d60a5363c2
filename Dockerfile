# One image for migrate, producer, consumer and etl; the command decides.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /app
# An environment without pip: the installer stays in this stage. Every file is checked against its hash.
COPY requirements/runtime.txt requirements/runtime.txt
RUN python -m venv --without-pip /opt/venv && \
    python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary :all: --require-hashes --requirement requirements/runtime.txt && \
    rm -r requirements
# The services run from /app, so that nothing has to be built. Their bytecode is made here because the
# containers' file systems are read-only, and the modes are set because a clone has those of its owner's umask.
COPY . .
RUN printf '%s\n' '#!/opt/venv/bin/python' 'import sys' 'from services.cli import main' 'sys.exit(main())' \
        >/opt/venv/bin/sensor-pipeline && \
    chmod 755 /opt/venv/bin/sensor-pipeline && \
    rm -rf requirements && \
    python -m compileall -q services migrations && \
    chmod -R u=rwX,go=rX /app

FROM ${PYTHON_IMAGE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sensor-pipeline" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.description="Sensor readings from Parquet through Kafka into TimescaleDB" \
      org.opencontainers.image.licenses="Apache-2.0"
# Nothing is installed from here on, so installers are removed: pip, and the wheel that could install it. A pip that
# belongs to the base's distribution does not uninstall itself.
RUN groupadd --gid 10001 pipeline && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin pipeline && \
    { python -m pip uninstall --yes --quiet --root-user-action=ignore pip || \
        python -c 'import pip, shutil; shutil.rmtree(pip.__path__[0])'; } && \
    python -c 'import ensurepip, shutil; shutil.rmtree(ensurepip.__path__[0])'
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Alembic finds its settings in /app/pyproject.toml, and relative paths of PARQUET_URL start here.
WORKDIR /app
USER 10001:10001
CMD ["sensor-pipeline", "--help"]
