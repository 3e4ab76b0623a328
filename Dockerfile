# Stages: `build` installs the locked dependencies, `test` adds what tests need, `runtime` is what is shipped.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /app
RUN python -m venv /venv
COPY requirements.txt .
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.txt

FROM build AS test
COPY requirements-dev.txt .
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements-dev.txt
ENV PATH=/venv/bin:$PATH PYTHONPATH=/copy/project:/copy/project/client

FROM ${BASE_IMAGE} AS runtime
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 launcher
WORKDIR /app
COPY --from=build /venv /venv
COPY app app
COPY client/runner_launcher_client runner_launcher_client
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app RUNNER_LAUNCHER_LISTEN=0.0.0.0:8080
USER launcher
EXPOSE 8080
ENTRYPOINT ["tini", "--", "python", "-m", "app.cli"]
CMD ["serve"]
