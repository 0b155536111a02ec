"""The commands of the README, run as they are printed, on a host of their own.

A host is made of namespaces: no network but its own, processes of its own, and folders that are written to without
harm. Where a person gives root's password, waits for the journal, has systemd or makes an environment with a pip of
its own, there is a script in its place.
"""

import asyncio
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL, STDOUT
from pathlib import Path

import pytest
from conftest import SCRIPT, UNMEASURED, namespaces

from faasd_async import make_parser

pytestmark = pytest.mark.no_cover  # what runs here is what was installed

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text()
FILE = re.compile(r"(?ms)`([\w-]+\.toml)`:\n\n```toml\n(.*?)^```$")
HEADING = re.compile(r"(?m)^#+ (.*)$")
LONGEST_S = 300.0  # A host is installed several times; never reached when all is well.
CODE = re.compile(r"(?ms)^#+ (?P<heading>[^\n]+)$|^```sh\n(?P<commands>.*?)^```$")

# A new host: what is written to these folders is gone with it. The network has nobody but ourselves in it.
HOST = """
set -eu
layers=$(mktemp -d)
mount -t tmpfs layers "$layers"
for folder in etc opt usr/local usr/share var; do
    mkdir -p "$layers/$folder/upper" "$layers/$folder/work"
    new="upperdir=$layers/$folder/upper,workdir=$layers/$folder/work"
    mount -t overlay -o "lowerdir=/$folder,$new" overlay "/$folder"
done
ip link set lo up
install -m 755 "$1"/bin/* /usr/local/bin
cd "$1/source"
export HOME="$1/home" PATH="/usr/local/bin:$PATH" PIP_NO_INDEX=1 PIP_FIND_LINKS="$2" PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_NO_COMPILE=0 # for pip this means not to: what is imported is compiled then
exec env -u PYTHONPATH -u CREDENTIALS_DIRECTORY bash "$1/commands"
"""

# What was begun last goes on in the background until it listens; if it ends, so do the commands.
LISTENING = "until curl -so /dev/null http://127.0.0.1:8080/healthz; do kill -0 $! || exit; sleep 0.1; done"
ROOTS_PASSWORD = 'exec "$@"'
NOTHING = ":"
SYSTEMD = f"""
start() {{
    mkdir -p -m 700 /var/lib/private/faasd-async
    ln -sfn private/faasd-async /var/lib/faasd-async
    STATE_DIRECTORY=/var/lib/faasd-async setsid $(sed -n 's/^ExecStart=//p' /etc/systemd/system/faasd-async.service) &
    {LISTENING}
}}
stop() {{
    pkill -f '/opt/faasd-async/bin/faasd-async serve'
    while pgrep -f '/opt/faasd-async/bin/faasd-async serve' >/dev/null; do sleep 0.1; done
}}
case "$*" in
    "enable --now faasd-async.socket faasd-async" | "start faasd-async.socket faasd-async") start ;;
    "disable --now faasd-async.socket faasd-async" | "stop faasd-async.socket faasd-async") stop ;;
    "restart faasd-async") stop; start ;;
    daemon-reload) ;;
    *) echo "systemctl $*: not known here" >&2; exit 1 ;;
esac
"""
# An environment is made as it is printed, but that its pip is the tests' own: to unpack and compile one for each takes
# as long as to install. That it works with its own too is seen wherever the tests themselves are installed.
PYTHON = f"""
case "$*" in
    "-m venv "*)
        {sys.base_prefix}/bin/python3 -m venv --without-pip "$3" || exit
        printf '#!/bin/bash\nexec {sys.executable} -m pip --python "${{0%%pip}}python" "$@"\n' >"$3/bin/pip"
        chmod 755 "$3/bin/pip"
        ;;
    *) exec {sys.base_prefix}/bin/python3 "$@" ;;
esac
"""
# Not run: there is no Docker here (test_packaging.py looks at the image), and the tests are what runs this.
NOT_RUN = ("docker compose", "'.[test]'")


def blocks(heading: str) -> list[str]:
    """The commands under a heading, block by block."""
    found, under = [], ""
    for match in CODE.finditer(README):
        under = match["heading"] or under
        if match["commands"] and under == heading:
            found.append(match["commands"])
    return found


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip finds where there is no network. The processes of one run of pytest share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheels"
    needed = ("flit_core>=3.12", "shtab", ".")
    pip = (*UNMEASURED, sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    with folder.with_name("wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first one makes them
        if not folder.exists():
            made = folder.with_name("wheels.made")
            subprocess.run([*pip, "wheel", "--no-build-isolation", "--wheel-dir", made, *needed], cwd=ROOT, check=True)
            made.rename(folder)
    return folder


def prepare(folder: Path, commands: str) -> None:
    """The source as somebody has fetched it, and what a host has that is not ours."""
    sources = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in sources.stdout.split():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    for name, content in FILE.findall(README):
        (folder / "source" / name).write_text(content)
    for name in ("bin", "home"):
        (folder / name).mkdir()
    scripts = {"sudo": ROOTS_PASSWORD, "apt": NOTHING, "journalctl": NOTHING, "systemctl": SYSTEMD, "python3": PYTHON}
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
    # A daemon that is started by hand stays in front of its person, who goes on in another window.
    started = re.sub(r"(?m)^(.* serve --config \S+)(?: &)?$", rf"\1 &\n{LISTENING}", commands)
    (folder / "commands").write_text(f"set -ex\nshopt -s expand_aliases\n{started}")


async def on_a_host(folder: Path, wheels: Path, commands: str) -> str:
    """What commands say that are run to their end; each of them has to do well."""
    if os.geteuid() != 0:
        pytest.skip("a host with its own /etc and /opt needs root")
    await asyncio.to_thread(prepare, folder, commands)
    host = namespaces("mount", "net", "pid", "fork", "kill-child", "mount-proc")
    command = (*UNMEASURED, *host, "bash", "-c", HOST, "host", str(folder), str(wheels))
    said = folder / "said"
    with said.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=out, stderr=STDOUT)
    try:
        await asyncio.wait_for(process.wait(), LONGEST_S)
    except TimeoutError:
        pytest.fail(f"after {LONGEST_S:g} s this is where it is:\n{said.read_text()}")
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.read_text()
    return said.read_text()


async def test_the_first_minutes_are_as_they_are_printed(tmp_path: Path, wheels: Path) -> None:
    """From nothing to a call that survives kill -9, and all that a shell can do with calls."""
    *tour, plug = blocks("Five minutes with curl")
    commands = [*blocks("faasd-async")[:1], *tour, *blocks("From a shell"), *blocks("Fn Project's interface"), plug]
    commands.append("fa calls list --function slow --limit 100 --json > slow.json\n")
    commands.append("""grep -q '"interrupted": 1' slow.json && test $(grep -c '"call_id"' slow.json) -ge 21\n""")
    said = await on_a_host(tmp_path, wheels, "\n".join(commands))
    for text in ("HELLO", "HTTP/1.1 202 Accepted", "X-Function-Name: upper", '"status": "success"', "All is well."):
        assert text in said, said
    assert re.search(r"(?m)^slow-queue: paused$", said)


async def test_it_is_installed_upgraded_backed_up_restored_moved_and_removed(tmp_path: Path, wheels: Path) -> None:
    """What was accepted is still there after each of them, until it is removed."""
    upgrade, roll_back, leave, arrive, remove = blocks("Upgrade, roll back, move, uninstall")
    back_up, restore = blocks("Back up and restore")
    look = 'faasd-async calls show "$first" --json | grep -q \'"status": "success"\'\n'
    later = 'later=$(faasd-async invoke upper --async -d later)\nfaasd-async calls show "$later" --wait\n'
    gone = 'if faasd-async calls show "$later"; then exit 1; fi\n'
    commands = [
        *blocks("Install"),
        "first=$(faasd-async invoke upper --async -d first)\nfaasd-async calls show $first --wait\n",
        *blocks("Scripts of yours, in /home"),
        *(look, upgrade, look, later, roll_back, look, gone),
        *("mkdir -p /var/backups\n", back_up, later, restore, look, gone),
        *(leave, "mv /var/lib/private/faasd-async elsewhere; mkdir /var/lib/private/faasd-async\n", arrive, look),
        "mkdir -p /etc/prometheus\n",
        *blocks("Prometheus"),
        remove,
        "for left in $(find /etc /opt /usr/local /usr/share /var -name '*faasd-async*' -newer \"$HOME\"); do\n"
        '    case $left in *rules.yml | /var/backups/*) ;; *) echo "$left is left"; exit 1 ;; esac\ndone\n',
        *blocks("Without a network"),
        "PATH=/opt/faasd-async/bin:$PATH\nfaasd-async check config.example.toml\n",
        *blocks("Schedules"),
    ]
    said = await on_a_host(tmp_path, wheels, "\n".join(commands))
    assert "\nconfig.example.toml: ok, 4 functions, " in said
    assert re.search(r"(?m)^nightly  .*disk", said)


async def test_a_daemon_that_does_not_start_is_told_at_once(tmp_path: Path) -> None:
    """By these tests: nobody waits for it to listen."""
    with pytest.raises(AssertionError, match="No such process"):
        await on_a_host(tmp_path, tmp_path, "false && faasd-async serve --config config.toml &\n")


async def test_each_command_is_run() -> None:
    """A new block belongs to one of the tests above."""
    here = ["Five minutes with curl", "From a shell", "Fn Project's interface", "Install", "Scripts of yours, in /home"]
    here += [
        "Upgrade, roll back, move, uninstall",
        "Back up and restore",
        "Prometheus",
        "Without a network",
        "Schedules",
    ]
    known = [blocks("faasd-async")[0], *(block for heading in here for block in blocks(heading))]
    everywhere = [match["commands"] for match in CODE.finditer(README) if match["commands"]]
    rest = [block for block in everywhere if block not in known]
    assert [block for block in rest if not any(word in block for word in NOT_RUN)] == []


async def test_each_command_in_the_text_is_one() -> None:
    """Also those in tables and sentences: the parser takes them, whatever stands for names and times."""
    told = re.findall(r"`faasd-async ((?:[a-z-]|\{)[^`]*)`", README)
    for words in {word.replace("{", "").replace("}", "") for word in told}:
        example = re.sub("…|WHEN", "24h", words).replace("STATUS", "error")
        try:
            make_parser().parse_args(shlex.split(example))
        except SystemExit:
            pytest.fail(f"faasd-async {words}")
    assert len(told) > 15


async def test_each_link_leads_somewhere() -> None:
    """To a heading, as GitHub names them, or to a file."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", README)
    headings = [re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-").lower() for heading in HEADING.findall(prose)]
    links = re.findall(r"\]\(([^)]+)\)", prose)
    inner = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert inner - {*headings} == set()
    files = {link for link in links if not link.startswith(("#", "http"))}
    assert {file for file in files if not (ROOT / file).exists()} == set()
    assert (len(inner) > 10, len(files) > 3) == (True, True)
