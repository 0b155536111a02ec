"""The alerts for Prometheus, by Prometheus's own tool, and by the figures of a real daemon."""

import re
from pathlib import Path

from conftest import SCRIPT, Gate, Server, StartDaemon, ask, run

RULES = SCRIPT.parent / "systemd/faasd-async.rules.yml"


async def test_prometheus_takes_the_alerts() -> None:
    """promtool has nothing to say against the file."""
    checked = await run("promtool", "check", "rules", "--lint-fatal", RULES)
    assert checked.code == 0, checked


async def test_alerts_fire_when_something_is_wrong_and_only_then() -> None:
    """What they make of a bad day and of a good one is written down in alerts.yml."""
    tested = await run("promtool", "test", "rules", Path(__file__).with_name("alerts.yml"))
    assert tested.code == 0, tested


async def test_what_alerts_are_about_is_there_to_be_scraped(daemon: StartDaemon, function: Server) -> None:
    """Each figure in a rule is one that the daemon has, once there was something to count; promtool finds no fault."""
    function.behaviour = Gate()
    settings = f'[functions.it]\nurl = "{function.url}"\n[queues.held]\n[gateway]\ndrain_timeout = "0s"'
    gateway = await daemon(settings + "\n[retry]\nattempts = 1\n[callback]\nattempts = 1")
    assert (await ask(gateway.url, "/system/queues/held/pause", method="POST")).status == 200
    await gateway.submit("it", X_Queue="held")
    sent = await gateway.submit("it", X_Callback_Url="http://127.0.0.1:1/", X_Deadline="1ms", X_Delay="1ms")
    await gateway.final(sent)
    metrics = (await ask(gateway.url, "/metrics")).body.decode()
    used = set(re.findall(r"faasd_async_\w+", " ".join(re.findall(r"expr: (.*)", RULES.read_text()))))
    assert used - set(re.findall(r"^(\w+)", metrics, re.MULTILINE)) == set()
    assert re.findall(r'^faasd_async_queue_paused{queue="(.*)"} (.*)', metrics, re.MULTILINE) == [
        ("faas-request", "0.0"),
        ("held", "1.0"),
    ]
    free = float(re.findall(r"^faasd_async_store_free_bytes (.*)", metrics, re.MULTILINE)[0])
    assert free > 1024
    linted = await run("promtool", "check", "metrics", stdin=metrics.encode())
    assert "error" not in linted.err, linted
