# Stages: `build` installs what is locked, `runtime` is what is shipped, `test` has what tests need. Without BuildKit all stages up
# to the wanted one are built in their order, so what changes most often comes last in each.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN python -m venv --without-pip /venv
COPY requirements.txt .
RUN pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check --only-binary :all: --require-hashes -r requirements.txt

FROM ${BASE_IMAGE} AS runtime
# tini reaps what runners leave behind, and passes signals on.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/log/apt /var/log/*.log \
 && useradd --create-home --uid 10001 launcher \
 && install --directory --owner launcher --group launcher --mode 0700 /var/lib/runner-launcher
WORKDIR /app
COPY --from=build /venv /venv
COPY client/runner_launcher_client runner_launcher_client
COPY app app
RUN python -m compileall -q . \
 && printf '#!/venv/bin/python\nfrom app.cli import main\nmain()\n' >/venv/bin/runner-launcher \
 && chmod +x /venv/bin/runner-launcher
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app \
    RUNNER_LAUNCHER_LISTEN=0.0.0.0:8080 RUNNER_LAUNCHER_STATE_DIR=/var/lib/runner-launcher
USER 10001:10001
VOLUME /var/lib/runner-launcher
EXPOSE 8080
# Whether the process answers, no more: a restart would not bring a database back, and would end local runners.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["python", "-I", "-c", "\
import http.client, os; \
host, _, port = os.environ['RUNNER_LAUNCHER_LISTEN'].rpartition(':'); \
there = http.client.HTTPConnection({'0.0.0.0': '127.0.0.1', '[::]': '::1'}.get(host, host.strip('[]')), int(port), timeout=4); \
there.request('GET', '/livez', headers={'Host': 'localhost'}); \
raise SystemExit(there.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "runner-launcher"]
CMD ["serve"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Runner Launcher" \
      org.opencontainers.image.description="Starts AI coding agents as local processes, Docker containers or Kubernetes Jobs" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM build AS test
COPY requirements-dev.txt .
RUN pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements-dev.txt
ENV PATH=/venv/bin:$PATH PYTHONPATH=/copy/project:/copy/project/client

FROM runtime
