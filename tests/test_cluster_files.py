"""What compose.cluster.yaml starts, started as processes: its servers' configuration and its daemons' settings."""

import asyncio
import contextlib
import os
import re
import tomllib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from conftest import SCRIPT, Daemon, Port, merge, to_toml
from jetstream import PROGRAM, ended, eventually

pytestmark = pytest.mark.no_cover  # the program runs in the daemons

ROOT = SCRIPT.parent
COMPOSE = (ROOT / "compose.cluster.yaml").read_text()
NAMES = ("n1", "n2", "n3")


def service(name: str) -> str:
    """What the compose file says of a service."""
    found = re.search(rf"(?ms)^  {name}:\n    (.*?)(?=^  \w|^\w)", COMPOSE.split("\nservices:\n")[1])
    assert found, name
    return found[1]


async def test_what_the_cluster_mounts_and_names_is_there() -> None:
    """The files are beside it, each server has its own name and its own volume, and daemons have ports that differ."""
    mounted = {*re.findall(r"\./([^:]+):", COMPOSE)}
    assert mounted == {"nats.cluster.conf", "config.cluster.toml"}
    assert all((ROOT / name).is_file() for name in mounted)
    for name in NAMES:
        assert f"SERVER_NAME: {name}}}" in service(name) and f'"{name}:/data"' in service(name)
        assert re.search(rf"(?m)^  {name}:$", COMPOSE.split("\nvolumes:\n")[1])
    ports = [re.findall(r'"127\.0\.0\.1:(\d+):8080"', service(name)) for name in ("d1", "d2")]
    assert ports == [["8081"], ["8082"]]
    settings = tomllib.loads((ROOT / "config.cluster.toml").read_text())
    assert settings["nats"]["servers"] == [f"nats://{name}:4222" for name in NAMES]


@contextlib.asynccontextmanager
async def servers(folder: Path) -> AsyncIterator[tuple[Mapping[str, str], list[asyncio.subprocess.Process]]]:
    """The three servers, on ports of this machine instead of names and those of containers."""
    text = (ROOT / "nats.cluster.conf").read_text()
    places = {f"{name}:{port}": Port() for name in NAMES for port in (4222, 6222)}
    addresses = {place: f"127.0.0.1:{port.number}" for place, port in places.items()}
    running: list[asyncio.subprocess.Process] = []
    try:
        for name in NAMES:
            ours = text.replace("/data", str(folder / name))
            for port in (4222, 6222):
                ours = ours.replace(f"0.0.0.0:{port}", addresses[f"{name}:{port}"])
            for place, address in addresses.items():
                ours = ours.replace(place, address)
            (folder / f"{name}.conf").write_text(ours)
            command = ("setpriv", "--pdeathsig", "KILL", PROGRAM, "-c", folder / f"{name}.conf", "-l", folder / "log")
            running.append(await asyncio.create_subprocess_exec(*command, env={**os.environ, "SERVER_NAME": name}))
        yield addresses, running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        for port_of in places.values():
            port_of.close()


async def test_both_daemons_run_calls_and_go_on_when_a_server_is_killed(tmp_path: Path) -> None:
    """As the compose file starts them: what one daemon accepts runs on both, with two servers as with three."""
    text = (ROOT / "config.cluster.toml").read_text()
    async with contextlib.AsyncExitStack() as stack:
        addresses, running = await stack.enter_async_context(servers(tmp_path))
        for place, address in addresses.items():
            text = text.replace(place, address)
        daemons = []
        for name in ("d1", "d2"):
            folder = tmp_path / name
            folder.mkdir()
            script = f"echo x >> {folder}/ran; sleep 0.05"
            ours = {"gateway": {"listen": "127.0.0.1:0"}, "functions": {"hello": {"command": ["sh", "-c", script]}}}
            one = Daemon(folder, to_toml(merge(tomllib.loads(text), ours)))
            stack.push_async_callback(one.close)
            await one.start()
            daemons.append(one)
        first, second = daemons

        async def accepted() -> str | None:
            with contextlib.suppress(AssertionError):
                return await first.submit("hello")
            return None

        async def all_run(number: int) -> None:
            calls = [await eventually(accepted) for _ in range(number)]

            async def states() -> Mapping[str, int] | None:
                with contextlib.suppress(AssertionError):  # It has just lost its server, and looks for another one.
                    return await ended(second, calls)
                return None

            assert await eventually(states) == {"success": number}

        async def both_ran_some() -> bool:
            await all_run(20)
            return all((one.folder / "ran").exists() for one in daemons)

        await all_run(1)
        await eventually(both_ran_some)  # A consumer that was made just now may have no leader yet.
        running[0].kill()
        await running[0].wait()
        await all_run(5)
