"""A 202 means on disk, seen from outside: the order of the daemon's system calls, as strace tells it."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Gate, Server, StartDaemon

# strace -f -y: "1234 pwrite64(7</tmp/calls.db-wal>, "…", 4096, 32) = 4096", or in two lines when another thread's call
# came in between: "1234 fdatasync(7</tmp/calls.db-wal> <unfinished ...>" and "1234 <... fdatasync resumed>) = 0".
BEGUN = re.compile(r"(\d+) +(\w+)\(\d+<([^>]*)>(.*)")
RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
CALLS = "trace=pwrite64,pwritev,fdatasync,fsync,write,writev,sendto,sendmsg"


@dataclass(frozen=True)
class Event:
    """A system call at the moment when it begins, or when it has ended."""

    name: str
    path: str
    data: str
    ended: bool
    failed: bool = False


def events(trace: str) -> Iterator[Event]:
    """What the daemon did, in order."""
    open_calls: dict[str, str] = {}  # by thread: the file of the call that is not finished
    for line in trace.splitlines():
        if match := BEGUN.match(line):
            thread, name, path, rest = match.groups()
            yield Event(name, path, rest, ended=False)
            if rest.endswith("<unfinished ...>"):
                open_calls[thread] = path
            else:
                yield Event(name, path, rest, ended=True, failed=" = -1 " in rest)
        elif match := RESUMED.match(line):
            thread, name, rest = match.groups()
            yield Event(name, open_calls.pop(thread), rest, ended=True, failed=" = -1 " in rest)


def unsynced(trace: str, calls: list[str]) -> list[str]:
    """The calls whose 202 was written before a sync of the store ended that had begun after their write to it."""
    written: set[str] = set()  # since the last sync began
    covered: set[str] = set()  # by the sync that is under way
    synced: set[str] = set()
    early, answered = [], set()
    for event in events(trace):
        to_store = event.path.endswith((".db", ".db-wal"))
        if event.name.startswith("pwrite") and to_store and not event.ended:
            written |= {call_id for call_id in calls if call_id in event.data}
        elif event.name in ("fdatasync", "fsync") and to_store and not event.ended:
            covered, written = covered | written, set()
        elif event.name in ("fdatasync", "fsync") and to_store and not event.failed:
            synced, covered = synced | covered, set()
        elif "HTTP/1.1 202" in event.data and not event.ended:
            told = {call_id for call_id in calls if call_id in event.data}
            early += sorted(told - synced)
            answered |= told
    assert answered == set(calls), "strace did not see every answer"
    return early


@pytest.mark.parametrize("connections", [1, 32])
async def test_a_202_is_written_after_the_sync_that_covers_its_call(
    daemon: StartDaemon, function: Server, tmp_path: Path, connections: int
) -> None:
    """One call after the other, and many at once that share their syncs."""
    function.behaviour = Gate()
    trace = tmp_path / "trace"
    # -D: the daemon keeps its place as our child, so that signals reach it and not strace.
    strace = ("strace", "-D", "-f", "-y", "-s", "200000", "-o", str(trace), "-e", CALLS)
    settings = f'[functions.it]\nurl = "{function.url}"\n[gateway]\ndrain_timeout = "0s"'
    gateway = await daemon(settings, prefix=strace)

    async def some(number: int) -> list[str]:
        return [await gateway.submit("it", b"x") for _ in range(number)]

    calls = sum(await asyncio.gather(*(some(64 // connections) for _ in range(connections))), list[str]())
    assert await gateway.terminate() == 0
    # strace ends after the daemon, and tells nobody.
    while not (text := trace.read_text(errors="replace")).rstrip().endswith("+++"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert unsynced(text, calls) == []
    syncs = sum(event.name == "fdatasync" and event.ended for event in events(text))
    assert (syncs < len(calls)) == (connections > 1)
