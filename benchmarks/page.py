#!/usr/bin/env python3
"""What the operator's page costs, and how soon it shows something.

    python benchmarks/page.py                     # with a million records, about two minutes
    python benchmarks/page.py --records 100000

  paint    from typing the address in until calls are on screen, in Debian's Chromium; the median of several
  idle     what one viewer costs the daemon while nothing happens, in percent of a processor
  burst    calls accepted in a second over 32 connections, and the processor time that the daemon uses for each,
           while five viewers look on, and while none does; a viewer is a stream of events, and the requests that
           the page makes, as often as it makes them. The time says what viewers cost it, also on a busy machine;
           the rate, only if nobody else wants the processors. The daemon has one of them for itself, as far as
           this program can see to it

The records are written into the store by SQL. wrk makes the burst. All traffic stays on 127.0.0.1. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import UNTIL, chromium  # noqa: E402

CONFIG = """
[gateway]
listen = "127.0.0.1:{port}"
[store]
path = "{folder}/calls.db"
[calls]
keep = "30d"
[queues.faas-request]
max_inflight = 1
max_pending = 10000000
[functions.busy]
command = ["sleep", "600"]
"""
# One in a hundred has failed; all within the last day.
RECORDS = """
WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < :records)
INSERT INTO calls (id, function, namespace, queue, status, attempts, max_attempts, start_time, started_at,
    completed_at, duration, http_status, error, request_bytes, response_bytes)
SELECT printf('%08x-0000-7000-8000-000000000000', n), 'f' || (n % 20), 'openfaas-fn', 'faas-request',
    iif(n % 100, 'success', 'error'), 1, 10, (:now - 86400.0 * (:records - n) / :records) * 1000000000,
    :now, :now, 0.01, iif(n % 100, 200, 500), iif(n % 100, NULL, 'function answered 500'), 100, 100
FROM number
"""
COUNTS = """
INSERT OR REPLACE INTO counts (lane, status, number)
SELECT function || '.' || namespace, status, count(*) FROM calls GROUP BY 1, 2
"""
SHOWN = "document.querySelectorAll('#calls tbody tr').length && performance.now()"
PACE_S = 0.5  # between looks of a page, as it has it
VIEWERS = 5
ROUNDS = 6
BURST_S = 5
IDLE_S = 20


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def daemon(folder: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon on the store in this folder, once it answers."""
    config = Path(folder) / "config.toml"
    config.write_text(CONFIG.format(folder=folder, port=port))
    command = [sys.executable, str(ROOT / "faasd_async.py"), "serve", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                break
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait()


def fill(folder: str, records: int) -> None:
    """Write final records into the store."""
    with contextlib.closing(sqlite3.connect(f"{folder}/calls.db")) as db:
        db.execute(RECORDS, {"records": records, "now": time.time()})
        db.execute(COUNTS)
        db.commit()


def cpu_s(pid: int) -> float:
    """The processor time that a process has used (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_percent(pid: int, seconds: float) -> float:
    """What a process uses meanwhile."""
    before = cpu_s(pid)
    time.sleep(seconds)
    return 100 * (cpu_s(pid) - before) / seconds


async def view(url: str) -> None:
    """Look on as a page does: when something has changed and a look is due, the list and the figures."""
    changed = asyncio.Event()
    many = False

    async def hear() -> None:
        nonlocal many
        async for piece in stream.content.iter_any():
            many = many or b"event: gap" in piece
            changed.set()

    async with aiohttp.ClientSession() as http, http.get(f"{url}/system/events") as stream:
        hearing = asyncio.create_task(hear())
        while not hearing.done():
            await changed.wait()
            changed.clear()
            begun = time.monotonic()
            for path in ("system/calls?limit=50", "system/stats"):
                async with http.get(f"{url}/{path}") as answer:
                    await answer.read()
            pace_s = 2 * PACE_S if many else PACE_S
            many = False
            await asyncio.sleep(max(pace_s, 2 * (time.monotonic() - begun)) - (time.monotonic() - begun))


def viewers(url: str) -> None:
    """Several of them, in a process of their own."""

    async def all_of_them() -> None:
        await asyncio.gather(*(view(url) for _ in range(VIEWERS)))

    asyncio.run(all_of_them())


def burst(url: str, pid: int) -> tuple[float, float]:
    """Calls accepted in a second, and the processor time for each, in microseconds."""
    before = cpu_s(pid)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write('wrk.method = "POST"\nwrk.body = "hello"\n')
        script.flush()
        command = ["wrk", "-t1", "-c32", f"-d{BURST_S}s", "-s", script.name, f"{url}/async-function/busy"]
        out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "Non-2xx" not in out, out
    (number,) = re.findall(r"(\d+) requests in", out)
    (rate,) = re.findall(r"Requests/sec:\s+([0-9.]+)", out)
    return float(rate), 1e6 * (cpu_s(pid) - before) / int(number)


def watched_burst(url: str, pid: int) -> tuple[float, float]:
    """The same while somebody looks on."""
    looking = multiprocessing.Process(target=viewers, args=(url,))
    looking.start()
    time.sleep(1)
    try:
        return burst(url, pid)
    finally:
        looking.terminate()
        looking.join()


def compare_bursts(url: str, pid: int) -> None:
    """Measure bursts with viewers and without, and print."""
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or {first})  # wrk and the viewers are started from here
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {first})
    rates, costs = [], []
    for number in range(ROUNDS):
        # The backlog grows all the time, so they take turns in being first.
        order = (True, False) if number % 2 else (False, True)
        seen = {watched: (watched_burst if watched else burst)(url, pid) for watched in order}
        (with_rate, with_us), (rate, us) = seen[True], seen[False]
        rates.append(with_rate / rate)
        costs.append(us / with_us)
        print(f"burst {with_rate:13.0f} calls/s, {with_us:.1f} µs each, with {VIEWERS} viewers")
        print(f"burst {rate:13.0f} calls/s, {us:.1f} µs each, without")
    print(f"burst {statistics.median(costs):13.3f} of the calls that a processor second is worth are left")
    print(f"burst {statistics.median(rates):13.2f} of the rate is left")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        with daemon(folder, port):
            pass
        fill(folder, arguments.records)
        with daemon(folder, port) as process, chromium() as driver:
            for name, place in (("calls", ""), ("error", "#calls?status=error"), ("oldest", "#calls?function=f1")):
                taken = []
                for _ in range(2 * ROUNDS):
                    driver.get("about:blank")
                    driver.get(f"{url}/ui/{place}")
                    taken.append(driver.execute_async_script(UNTIL % SHOWN))
                print(f"paint {name:8} {statistics.median(taken):8.0f} ms")
            driver.get("about:blank")
            time.sleep(15)  # until the stream's end has been noticed, and watching has ended
            alone = used_percent(process.pid, IDLE_S)
            driver.get(f"{url}/ui/")
            time.sleep(3)
            viewed = used_percent(process.pid, IDLE_S)
            print(f"idle  {viewed - alone:13.2f} % of a processor ({alone:.2f} without a viewer)")
            driver.get("about:blank")
            compare_bursts(url, process.pid)


if __name__ == "__main__":
    main()
