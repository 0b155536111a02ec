"""What the whole daemon shows of itself, and what it tells as it happens."""

import json
from typing import Any

from conftest import Daemon, Gate, Server, StartDaemon, answer, ask

SETTINGS = """
[functions.it]
url = "{url}"
queue = "line"
max_inflight = 3
[functions.other]
command = ["true"]
[functions.gone]
command = ["/no/such/program"]
[retry]
attempts = 1
"""


async def stats(gateway: Daemon) -> dict[str, Any]:
    """What /system/stats says."""
    reply = await ask(gateway.url, "/system/stats")
    assert reply.status == 200, reply
    document: dict[str, Any] = json.loads(reply.body)
    return document


async def test_stats_tell_what_became_of_all_calls(daemon: StartDaemon, function: Server, sink: Server) -> None:
    """By state and by function, also after a restart; the hour is that of the process."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    await gateway.final(await gateway.submit("it", X_Callback_Url=sink.url))
    function.behaviour = answer(400)
    await gateway.final(await gateway.submit("it"))
    function.behaviour = gate = Gate()
    running = await gateway.submit("it")
    await function.wait_for(3)
    await gateway.submit("it", X_Delay="1h")
    await gateway.submit("other", X_Delay="1h")
    shown = await stats(gateway)
    counts = {"delayed": 2, "queued": 0, "running": 1, "success": 1, "error": 1, "timeout": 0, "cancelled": 0}
    assert shown["counts"] == counts
    assert shown["callbacks"] == {"pending": 0, "delivered": 1, "failed": 0}
    it = next(item for item in shown["functions"] if item["name"] == "it")
    assert it["counts"] == {"delayed": 1, "running": 1, "success": 1, "error": 1}
    assert (it["kind"], it["queue"], it["max_inflight"], it["inflight"]) == ("url", "line", 3, 1)
    assert (sum(it["hour"]["calls"]), sum(it["hour"]["failures"])) == (2, 1)
    line = next(item for item in shown["queues"] if item["name"] == "line")
    assert {kind: sum(minutes) for kind, minutes in line["hour"].items()} == {"accepted": 4, "ended": 2, "failed": 1}
    assert (line["depth"], line["inflight"]) == (1, 1)
    gate.open()
    await gateway.final(running)
    await gateway.terminate()
    await gateway.start()
    shown = await stats(gateway)
    assert shown["counts"] == counts | {"running": 0, "success": 2}
    assert shown["callbacks"] == {"pending": 0, "delivered": 1, "failed": 0}


async def test_stats_tell_how_the_host_is(daemon: StartDaemon, function: Server) -> None:
    """What is stored, what is left, what commits take, what is wrong."""
    gateway = await daemon(SETTINGS.format(url=function.url))
    await gateway.final(await gateway.submit("it"))
    shown = await stats(gateway)
    assert shown["trouble"] is None
    assert shown["durable"] is True
    assert shown["guarantee"] == "a call is on disk before its 202"
    store = shown["store"]
    assert (store["backend"], store["place"]) == ("sqlite", str(gateway.store))
    assert store["used_bytes"] > 0
    assert store["free_bytes"] > 0
    assert 0 < shown["commit_seconds"]["p50"] <= shown["commit_seconds"]["p99"]
    assert shown["memory_bytes"] > 1_000_000
    assert shown["uptime_seconds"] > 0
    assert shown["warnings"] == ["functions.gone.command: there is no program /no/such/program"]
