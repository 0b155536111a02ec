# The state is in /var/lib/faasd-async; nothing else is written, so the root file system may be read-only.
FROM docker.io/library/python:3.11-slim-bookworm AS build
COPY LICENSE README.md faasd_async.py pyproject.toml /src/
RUN python -m venv /opt/faasd-async \
    && /opt/faasd-async/bin/pip install --no-cache-dir /src \
    && /opt/faasd-async/bin/pip uninstall --yes pip setuptools

FROM docker.io/library/python:3.11-slim-bookworm
COPY --from=build /opt/faasd-async /opt/faasd-async
# Yours is mounted in its place.
COPY config.example.toml /etc/faasd-async/config.toml
RUN install -d -o 65534 -g 65534 -m 700 /var/lib/faasd-async
ENV PATH=/opt/faasd-async/bin:$PATH STATE_DIRECTORY=/var/lib/faasd-async
USER 65534:65534
VOLUME /var/lib/faasd-async
EXPOSE 8080
STOPSIGNAL SIGTERM
# Not by way of a proxy, which Docker may have set in the environment.
HEALTHCHECK --interval=30s --timeout=15s --start-period=10s CMD \
    ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=12); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
# As process 1 it handles signals and reaps what its functions leave behind: no init is needed.
ENTRYPOINT ["faasd-async"]
# Every address of the container, whatever the file says: who reaches it is what `ports:` decides.
CMD ["serve", "--config", "/etc/faasd-async/config.toml", "--listen", "0.0.0.0:8080"]
