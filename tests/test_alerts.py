"""The alerts for Prometheus, by Prometheus's own tool, and by the figures of a real daemon."""

import asyncio
import re
from pathlib import Path

from conftest import PATIENCE, SCRIPT, StartDaemon, ask, run

RULES = SCRIPT.parent / "systemd/faasd-async.rules.yml"


async def test_prometheus_takes_the_alerts() -> None:
    """promtool has nothing to say against the file."""
    checked = await run("promtool", "check", "rules", "--lint-fatal", RULES)
    assert checked.code == 0, checked


async def test_alerts_fire_when_something_is_wrong_and_only_then() -> None:
    """What they make of a bad day and of a good one is written down in alerts.yml."""
    tested = await run("promtool", "test", "rules", Path(__file__).with_name("alerts.yml"))
    assert tested.code == 0, tested


async def test_what_alerts_are_about_is_there_to_be_scraped(daemon: StartDaemon) -> None:
    """From the start, with no call so far: what appears as 1 has not increased. promtool finds no fault."""
    schedule = '[schedules.nightly]\nfunction = "it"\ncron = "0 3 1 1 *"'
    gateway = await daemon(f'[functions.it]\ncommand = ["true"]\n[queues.held]\n{schedule}')
    assert (await ask(gateway.url, "/system/queues/held/pause", method="POST")).status == 200
    metrics = ""
    async with asyncio.timeout(PATIENCE):
        while "faasd_async_schedule_missed_total{" not in metrics:  # once the clock is looked at
            metrics = (await ask(gateway.url, "/metrics")).body.decode()
    expressions = " ".join(re.findall(r"expr: (.*)", RULES.read_text()))
    used = set(re.findall(r"faasd_async_\w+", expressions))
    assert used - set(re.findall(r"^(\w+)", metrics, re.MULTILINE)) == set()
    for status in ("error", "timeout"):
        assert f'\nfaasd_async_calls_total{{status="{status}"}} 0.0\n' in metrics
    assert '\nfaasd_async_callbacks_total{status="failed"} 0.0\n' in metrics
    for queue in ("faas-request", "held"):
        assert f'\nqueue_worker_messages_submitted_total{{queue_name="{queue}"}} 0.0\n' in metrics
        assert f'\nqueue_worker_messages_processed_total{{queue_name="{queue}"}} 0.0\n' in metrics
        assert f'\nfaasd_async_oldest_seconds{{queue="{queue}"}} 0.0\n' in metrics
    assert re.findall(r'^faasd_async_queue_paused{queue="(.*)"} (.*)', metrics, re.MULTILINE) == [
        ("faas-request", "0.0"),
        ("held", "1.0"),
    ]
    free = float(re.findall(r"^faasd_async_store_free_bytes (.*)", metrics, re.MULTILINE)[0])
    assert free > 1024
    linted = await run("promtool", "check", "metrics", stdin=metrics.encode())
    assert "error" not in linted.err, linted
