"""A power cut, for real: the store lies on a disk that forgets what was not synced (power_cut.py has the model)."""

import asyncio
import collections
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import PATIENCE, UNMEASURED, Daemon, Gate, Server, StartDaemon, entering
from jetstream import NatsServer
from nats.js.api import StreamConfig
from power_cut import SECTOR
from test_crash import CANCELLED, ENDS, Witness, is_done, submit_many

CUTS = int(os.environ.get("FAASD_ASYNC_CUTS", 10))  # 300 for the long form
BURST = 50  # calls or messages
SECTORS = 64


def changed(pragma: str, value: str) -> str:
    """For `before`: the daemon has another value for a pragma of its store."""
    return f"""
import re
change = lambda text: re.sub("^{pragma} = .*", "{pragma} = {value}", text)
faasd_async.PRAGMAS = tuple(map(change, faasd_async.PRAGMAS))
faasd_async.REQUIRED_PRAGMAS.pop("{pragma}", None)
"""


AS_IT_IS = ""
WITHOUT_SYNCS = changed("synchronous", "NORMAL")
WITH_CHECKPOINTS = changed("wal_autocheckpoint", "20")  # pages: one every few commits


class Disk:
    """One that only those see who `enter` it, in a mount namespace of its own, which ends with it.

    A command does so with that as its prefix, a daemon with `before`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "mount"
        self.early = 0.0  # the probability with which it takes what is written before it must
        self._platter = folder / "platter"
        self._mounts = 0  # so far; each is lucky in another way
        self._process: asyncio.subprocess.Process | None = None
        self.folder.mkdir()
        self._platter.mkdir()

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command begins with that is to see it."""
        users = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        return ("nsenter", "--target", str(self._pid), "--mount", *users)

    @property
    def before(self) -> str:
        """What a daemon begins with."""
        return entering(self._pid)

    @property
    def root(self) -> Path:
        """Its folder as others see it."""
        return Path(f"/proc/{self._pid}/root{self.folder}")

    @property
    def _pid(self) -> int:
        assert self._process is not None, "the disk has no power"
        return self._process.pid

    async def connect(self) -> None:
        """Give it power."""
        users = () if os.geteuid() == 0 else ("--map-root-user",)
        script = Path(__file__).with_name("power_cut.py")
        self._mounts += 1
        self._process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", *users, *UNMEASURED, sys.executable, script),
            *(self.folder, self._platter, str(self.early), str(self._mounts)),
            stdin=asyncio.subprocess.PIPE,  # It ends when we do.
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if not await asyncio.wait_for(self._process.stdout.readline(), PATIENCE):
            pytest.skip("this needs libfuse, /dev/fuse, and root or a kernel that lets users mount")

    async def cut(self) -> None:
        """Take the power away."""
        os.kill(self._pid, signal.SIGKILL)
        await self.close()

    async def close(self) -> None:
        """Wait until it is gone."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await asyncio.wait_for(self._process.wait(), PATIENCE)
            self._process = None


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    """An empty one, without power. The daemon comes after it, so that it ends before it."""
    disk = Disk(tmp_path)
    yield disk
    await disk.close()


def settings(disk: Disk, function: Server, more: str = "") -> str:
    """One function, `it`, and the store on the disk, in a folder that the daemon makes."""
    return f'[store]\npath = "{disk.folder}/var/lib/calls.db"\n[functions.it]\nurl = "{function.url}"\n{more}'


async def switch_on(gateway: Daemon, disk: Disk, change: str = AS_IT_IS) -> None:
    """Start the machine: the disk, and the daemon with this change."""
    await disk.connect()
    gateway.before = disk.before + change
    await gateway.start()


async def cut_power(gateway: Daemon, disk: Disk) -> None:
    """Take the power away from both."""
    gateway.signal(signal.SIGKILL)  # What it has under way at the disk goes on for a moment, or not.
    await disk.cut()
    await gateway.ended()


async def lost(gateway: Daemon, calls: list[str]) -> list[str]:
    """Those of the calls that the daemon does not know."""
    unknown = []
    for call_id in calls:
        async with gateway.http.get(f"{gateway.url}/system/calls/{call_id}") as response:
            assert response.status in (200, 404), await response.text()
            if response.status == 404:
                unknown.append(call_id)
    return unknown


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


async def test_the_disk_keeps_what_was_synced_and_nothing_else(disk: Disk) -> None:
    """Content by a sync of the file, names by a sync of the folder."""
    await disk.connect()
    for name in ("kept", "renamed", "removed", "empty"):
        (disk.root / name).write_text("old")
    for name in ("kept", "renamed", "removed"):
        sync(disk.root / name)
    sync(disk.root)
    (disk.root / "kept").write_text("new")
    (disk.root / "renamed").rename(disk.root / "other")
    (disk.root / "removed").unlink()
    (disk.root / "added").write_text("new")
    sync(disk.root / "added")
    await disk.cut()
    await disk.connect()
    assert {path.name: path.read_text() for path in disk.root.iterdir()} == {
        "kept": "old", "renamed": "old", "removed": "old", "empty": "",
    }  # fmt: skip


async def test_the_disk_may_keep_any_part_of_what_was_not_synced(disk: Disk) -> None:
    """Sector by sector: some are as of the last sync, some are newer."""
    disk.early = 0.5
    await disk.connect()
    file = disk.root / "file"
    file.write_bytes(b"o" * SECTORS * SECTOR)
    sync(file)
    sync(disk.root)
    with file.open("r+b") as out:
        out.write(b"n" * SECTORS * SECTOR)
    await disk.cut()
    await disk.connect()
    data = (disk.root / "file").read_bytes()
    sectors = [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
    assert len(sectors) == SECTORS
    assert set(sectors) == {b"o" * SECTOR, b"n" * SECTOR}


@pytest.mark.parametrize("change", [AS_IT_IS, WITHOUT_SYNCS], ids=["as it is", "without syncs"])
async def test_a_power_cut_right_after_the_202_loses_no_call(
    disk: Disk, daemon: StartDaemon, function: Server, change: str
) -> None:
    """Not even the first ones of a new file in a new folder. A daemon that does not sync its commits does lose them."""
    function.behaviour = Gate()
    gateway = await daemon(settings(disk, function), start=False)
    await switch_on(gateway, disk, change)
    calls = await submit_many(gateway, BURST)
    await cut_power(gateway, disk)
    await switch_on(gateway, disk)
    assert bool(await lost(gateway, calls)) == (change == WITHOUT_SYNCS)


@pytest.mark.unmeasured
async def test_random_power_cuts_under_a_mixed_load_break_no_promise(
    disk: Disk, daemon: StartDaemon, function: Server, sink: Server
) -> None:
    """Whatever the disk has of what was not synced: each accepted call is known and ends, in one state, and stays
    there; none runs again once its outcome is stored."""
    disk.early = 0.3
    more = (
        "[queues.faas-request]\nmax_inflight = 16\n[queues.slow]\nmax_inflight = 4\n"
        '[retry]\nattempts = 1000\nmax_interruptions = 1000\nmax_wait = "50ms"\n'
        "[callback]\nattempts = 1000\n"
    )
    gateway = await daemon(settings(disk, function, more), start=False)
    witness = Witness(gateway, sink)
    function.behaviour, sink.behaviour, stories = witness.function, witness.callback, witness.stories
    await switch_on(gateway, disk)
    for _ in range(CUTS):
        witness.some_accepted.clear()
        clients = [asyncio.create_task(witness.client()) for _ in range(6)]
        # The moment of the cut is the thing here: any moment in the first fifth of a second under load.
        await asyncio.sleep(witness.chance.uniform(0, 0.2))
        await witness.some_accepted.wait()
        await cut_power(gateway, disk)
        await asyncio.gather(*clients)
        witness.life += 1
        await switch_on(gateway, disk, (AS_IT_IS, WITH_CHECKPOINTS)[witness.life % 2])
        known = await witness.records()
        assert {call_id for call_id, story in stories.items() if story.accepted} <= known.keys()
        for call_id, record in known.items():
            if record["completed_at"] is None and stories[call_id].path in ("", *CANCELLED):
                await witness.cancel(call_id, stories[call_id])

    deadline = time.monotonic() + PATIENCE
    while not all(map(is_done, (await witness.records()).values())):
        assert time.monotonic() < deadline, gateway.log
        await asyncio.sleep(0.05)
    final = await witness.records()
    accepted = {call_id: story for call_id, story in stories.items() if story.accepted}
    for call_id, story in accepted.items():
        record = final[call_id]
        assert (record["status"], record["callback"]["status"]) in ENDS[story.path], (record, story)
        assert story.runs <= record["attempts"] or story.redriven, (record, story)
        if story.path == "/plain":
            assert record["attempts"] == 1 + record["interrupted"], record
        assert bool(story.callbacks) == (record["callback"]["status"] == "delivered"), story
    assert witness.wrong == []
    assert "damaged" not in gateway.log
    again = sum(story.runs > 1 for story in accepted.values())
    print(f"{CUTS} cuts, {len(accepted)} calls accepted, {again} run more than once")
    assert min(collections.Counter(story.path for story in accepted.values()).values()) >= CUTS // 4


@contextlib.asynccontextmanager
async def nats_server(disk: Disk, folder: Path, sync_interval: str) -> AsyncIterator[NatsServer]:
    """One whose store is on the disk. In the end the power of both is cut."""
    await disk.connect()
    store = {"store_dir": f"{disk.folder}/jetstream", "max_file_store": 2**30, "sync_interval": sync_interval}
    server = NatsServer(folder, {"jetstream": store}, prefix=disk.enter)
    try:
        await server.start()
        yield server
    finally:
        await server.close()
        await disk.cut()


@pytest.mark.parametrize("sync_interval", ["always", "2m"])
async def test_a_nats_server_keeps_what_it_acknowledged_if_it_always_syncs(
    disk: Disk, tmp_path: Path, sync_interval: str
) -> None:
    """With its default of two minutes it loses some, even of a stream that has been there for long."""
    async with nats_server(disk, tmp_path, sync_interval) as server, server.jetstream() as jetstream:
        await jetstream.add_stream(StreamConfig(name="calls", subjects=["calls"]))
        for path in (disk.root, *disk.root.rglob("*")):  # The server does not sync all the names on the way there.
            sync(path)
        for _ in range(BURST):
            await jetstream.publish("calls", b"x")
    async with nats_server(disk, tmp_path, sync_interval) as server, server.jetstream() as jetstream:
        left = (await jetstream.stream_info("calls")).state.messages
    assert (left == BURST) == (sync_interval == "always")
