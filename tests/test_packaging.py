"""What is shipped: a wheel that has everything, a script that says what it lacks, an image that can be built."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import DEVNULL, PIPE, SCRIPT, UNMEASURED, Finished, StartDaemon, run, start_program

from faasd_async import OLDEST_AIOHTTP

ROOT = SCRIPT.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INLINE = r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$"  # the expression of PEP 723
PIP = (*UNMEASURED, sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def copied_by_the_dockerfile() -> list[str]:
    """The files of this folder that the image is made of."""
    lines = re.findall("^COPY (?!--from)(.*) /", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the Dockerfile copies, and nothing else."""
    folder = tmp_path_factory.mktemp("source")
    for name in copied_by_the_dockerfile():
        shutil.copy(ROOT / name, folder)
    return folder


def listing(folder: Path) -> list[Path]:
    """What is in a folder and below."""
    return sorted(folder.rglob("*"))


def content(wheel: Path) -> dict[str, str]:
    """The files of a wheel, by name without folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist()}


async def test_a_script_lists_what_the_package_needs() -> None:
    """`uv run faasd_async.py` reads it from the first lines."""
    (block,) = re.finditer(INLINE, SCRIPT.read_text())
    lines = [line.removeprefix("#").removeprefix(" ") for line in block["content"].splitlines()]
    inline = tomllib.loads("\n".join(lines))
    assert inline == {name: PROJECT[name] for name in ("requires-python", "dependencies")}


async def test_the_wheel_is_complete_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    """A folder in which root has installed from is as it was for the next user."""
    before = listing(source)
    built = await run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, source)
    assert built.code == 0, built
    assert listing(source) == before
    (wheel,) = listing(tmp_path)
    files = content(wheel)
    assert files["faasd_async.py"] == SCRIPT.read_text()
    assert files["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert "faasd-async=faasd_async:main" in files["entry_points.txt"].replace(" ", "")
    assert "License-Expression: MIT" in files["METADATA"]
    assert (ROOT / "README.md").read_text().strip() in files["METADATA"]


# ---- a script on a machine that lacks something ----------------------------------------------------------------


async def script(*words: str, python: str = sys.executable, options: tuple[str, ...] = ()) -> Finished:
    """Run the file itself, with no variables of ours."""
    return await run("env", "-i", f"PATH={os.environ['PATH']}", python, *options, SCRIPT, *words)


async def test_the_file_runs_as_a_script() -> None:
    """Given to Python, or started by itself, which its first line and its mode are for."""
    said = f"faasd-async {PROJECT['version']}\n"
    assert (await script("--version")).out == said
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")


async def test_a_library_that_is_missing_is_told_in_one_line() -> None:
    """Python without its packages (-S) has no yarl."""
    missing = await script("--version", options=("-S",))
    assert (missing.code, missing.out, missing.err.count("\n")) == (1, "", 1)
    assert "No module named 'yarl'" in missing.err
    assert "pip install ." in missing.err


async def test_a_library_that_only_a_daemon_needs_is_missed_by_that() -> None:
    """With the exit code after which no restart is tried."""
    missing = "import sys; sys.modules['prometheus_client'] = None"
    process = await start_program("serve", before=missing, stdin=DEVNULL, stderr=PIPE)
    _, err = await process.communicate()
    assert (process.returncode, err.count(b"\n")) == (78, 1)
    assert b"prometheus_client" in err
    assert b"pip install ." in err


def test_a_command_does_not_import_what_only_a_daemon_needs() -> None:
    """It would take twice as long."""
    libraries = {"aiohttp", "nats", "prometheus_client"}
    program = f"import faasd_async, sys; print({libraries} & set(sys.modules))"
    command = [*UNMEASURED, sys.executable, "-c", program]
    assert subprocess.run(command, stdout=PIPE, check=True).stdout == b"set()\n"


async def test_an_aiohttp_that_is_too_old_is_told_in_one_line(tmp_path: Path) -> None:
    """Debian 12 has 3.8: with the line are the version and the place, and no restart is tried."""
    old = "import aiohttp; aiohttp.__version__ = '3.8.4'"
    process = await start_program("serve", before=old, stdin=DEVNULL, stderr=PIPE)
    _, err = await process.communicate()
    assert (process.returncode, err.count(b"\n")) == (78, 1)
    assert b"aiohttp 3.14 or later is needed, and there is 3.8.4 in /" in err
    (needed,) = [need for need in PROJECT["dependencies"] if need.startswith("aiohttp>")]
    assert needed.startswith(f"aiohttp>={'.'.join(map(str, OLDEST_AIOHTTP))},")


def old_interpreters() -> list[str]:
    """The paths of Python 3.9 and 3.10, as far as this machine has them."""
    folders = [*Path.home().glob(".pyenv/versions/3.*/bin"), *map(Path, os.environ["PATH"].split(":"))]
    found = [folder / f"python{version}" for folder in folders for version in ("3.9", "3.10")]
    return [str(path) for path in found if path.exists() and path.parent.name != "shims"]


async def test_a_python_that_is_too_old_is_told_in_one_line() -> None:
    """By interpreters that are as old as they say, and by this one, which pretends to be."""
    pretend = f"import sys; sys.version_info = (3, 10, 2); exec(compile(open({str(SCRIPT)!r}).read(), 'x', 'exec'))"
    results = [await run(sys.executable, "-c", pretend)]
    results += [await script("--version", python=python) for python in old_interpreters()]
    for old in results:
        assert (old.code, old.out, old.err.count("\n")) == (1, "", 1)
        assert re.search(r"Python 3\.11 or later is needed, and .* is Python 3\.(9|10)", old.err)


# ---- the image -------------------------------------------------------------------------------------------------


async def test_what_the_dockerfile_copies_is_sent_to_docker() -> None:
    """Nothing but what is named in .dockerignore is, and that is all there."""
    sent = re.findall("^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied_by_the_dockerfile()) == sorted(sent)
    assert [name for name in sent if not (ROOT / name).is_file()] == []


async def test_what_compose_mounts_is_there() -> None:
    """A file that is missing on the host would become a folder in the container."""
    mounted = re.findall(r"^ +- \./([^:]+):", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    assert mounted == ["config.example.toml"]
    assert (ROOT / mounted[0]).is_file()


async def test_the_image_knows_whether_its_daemon_is_well(daemon: StartDaemon) -> None:
    """Also where Docker has set a proxy for all its containers, which can't reach the daemon."""
    (words,) = re.findall(r"^HEALTHCHECK .*\\\n +(\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    python, *arguments, program = json.loads(words)
    assert (python, program.count("8080")) == ("python", 1)
    gateway = await daemon("")
    proxies = ("HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1")
    for port, code in ((gateway.url.rpartition(":")[2], 0), ("1", 1)):
        check = (sys.executable, *arguments, program.replace("8080", port))
        result = await run("env", "-u", "no_proxy", "-u", "NO_PROXY", *proxies, *check)
        assert result.code == code, result
