"""What people and programs ask a daemon about its calls."""

import json
from typing import Any
from urllib.parse import quote

from conftest import Daemon, Reply, ask


async def get(gateway: Daemon, target: str) -> Any:
    """The JSON document at a path."""
    reply = await ask(gateway.url, target)
    assert reply.status == 200, (target, reply)
    assert reply.headers["Content-Type"].startswith("application/json")
    return json.loads(reply.body)


async def cancel(gateway: Daemon, call_id: str) -> int:
    """DELETE a call; the status of the answer."""
    return (await ask(gateway.url, f"/async-function/{quote(call_id, safe='')}", method="DELETE")).status


async def run_again(gateway: Daemon, call_id: str) -> Reply:
    """Ask for a finished call to be run once more."""
    return await ask(gateway.url, f"/system/calls/{quote(call_id, safe='')}/retry", method="POST")


async def log_of(gateway: Daemon, call_id: str) -> bytes:
    """What a call's function wrote."""
    reply = await ask(gateway.url, f"/system/calls/{quote(call_id, safe='')}/log")
    assert reply.status == 200, reply
    return reply.body
