# The state is in /var/lib/faasd-async; nothing else is written, so the root file system may be read-only.
FROM docker.io/library/python:3.11-slim-bookworm AS build
COPY pyproject.toml README.md faasd_async.py /src/
RUN python -m venv /opt/faasd-async \
    && /opt/faasd-async/bin/pip install --no-cache-dir /src \
    && /opt/faasd-async/bin/pip uninstall --yes pip setuptools

FROM docker.io/library/python:3.11-slim-bookworm
COPY --from=build /opt/faasd-async /opt/faasd-async
RUN install -d -o 65534 -g 65534 -m 700 /var/lib/faasd-async
ENV PATH=/opt/faasd-async/bin:$PATH STATE_DIRECTORY=/var/lib/faasd-async
USER 65534:65534
VOLUME /var/lib/faasd-async
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=10s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=12)"]
ENTRYPOINT ["faasd-async"]
CMD ["serve", "--config", "/etc/faasd-async/config.toml"]
