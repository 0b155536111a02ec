"""A disk whose power can be cut: a file system that forgets what was not synced.

    python power_cut.py MOUNT PLATTER EARLY SEED

mounts it on MOUNT and says so. What reaches the folder PLATTER is on the disk; all else is in this process only, which
SIGKILL ends: that is the cut. Mounted again, it has what PLATTER has.

The model, on no point kinder than a disk may be:

- Content, with its size, is on the disk once fsync or fdatasync of the file has come back, and a name (a file or folder
  that was made, renamed or removed) once fsync of its folder has. Linux's own file systems do more: they keep the order
  of such changes, and sync the name with the file. POSIX promises none of it.
- Before that, the disk takes each sector of 512 bytes with the probability EARLY as soon as it is written, and each
  change of a folder: a cut leaves any subset of what was not synced, also in the middle of a write.
- A sync writes its sectors in random order, so that a cut in the middle of it leaves any subset, too.
- Modes and times are not kept.
"""

import json
import os
import random
import stat
import sys
import threading
from collections.abc import Callable
from errno import ENOENT
from pathlib import Path, PurePosixPath
from typing import Any

SECTOR = 512  # the least that a disk writes or doesn't
ROOT = 1  # the number of the uppermost folder

Luck = Callable[[], bool]  # whether the disk takes something before it must


class File:
    """What programs see of a file, and what of it the disk has not."""

    def __init__(self, path: Path, luck: Luck) -> None:
        self.mode = stat.S_IFREG | 0o600
        self._disk = os.open(path, os.O_RDWR | os.O_CREAT)
        self._luck = luck
        self._data = bytearray(path.read_bytes())
        self._dirty: set[int] = set()  # the sectors that differ from those on the disk, or did

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self._data)

    def read(self, size: int, at: int) -> bytes:
        """As pread(2)."""
        return bytes(self._data[at : at + size])

    def write(self, data: bytes, at: int) -> None:
        """As pwrite(2)."""
        end = at + len(data)
        self._data.extend(bytes(max(0, at - self.size)))
        self._data[at:end] = data
        for sector in range(at // SECTOR, -(-end // SECTOR)):
            self._dirty.add(sector)
            if self._luck():
                self._take(sector)

    def truncate(self, size: int) -> None:
        """As ftruncate(2). The disk has the old content behind that until it is told otherwise."""
        self._dirty.update(range(size // SECTOR, -(-self.size // SECTOR)))
        del self._data[size:]
        self._data.extend(bytes(size - self.size))

    def sync(self) -> None:
        """Have all of it on the disk."""
        sectors = list(self._dirty)
        random.shuffle(sectors)
        for sector in sectors:
            self._take(sector)
        os.ftruncate(self._disk, self.size)

    def _take(self, sector: int) -> None:
        os.pwrite(self._disk, self.read(SECTOR, sector * SECTOR), sector * SECTOR)
        self._dirty.discard(sector)


class Folder:
    """Names, each of the number of a file or folder."""

    size = 0

    def __init__(self, path: Path, luck: Luck) -> None:
        self.mode = stat.S_IFDIR | 0o700
        self._path = path
        self._luck = luck
        self.entries: dict[str, int] = {}
        if path.exists():
            self.entries = json.loads(path.read_text())
        else:
            self.sync()  # It exists from now on, if its name does.

    def changed(self) -> None:
        """Entries were added or removed."""
        if self._luck():
            self.sync()

    def sync(self) -> None:
        """Have the entries on the disk, all at once."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.entries))
        new.replace(self._path)


class Volatile:
    """The operations of FUSE, as mfusepy calls them. A handle of an open file is its number."""

    use_ns = True  # mfusepy asks for the unit of times

    def __init__(self, platter: Path, luck: Luck) -> None:
        self._platter = platter
        self._luck = luck
        self._nodes: dict[int, File | Folder] = {}  # by number, as far as they were asked for
        self._last = max((int(path.stem) for path in platter.iterdir()), default=ROOT)
        self._nodes[ROOT] = Folder(platter / f"{ROOT}.folder", luck)

    def init(self, path: str) -> None:
        """All is ready."""
        print("mounted", flush=True)

    def getattr(self, path: str, handle: int | None = None) -> dict[str, Any]:
        """As stat(2)."""
        node = self._node(handle or self._number(path))
        return {"st_mode": node.mode, "st_size": node.size, "st_nlink": 1}

    def chmod(self, path: str, mode: int) -> None:
        """As chmod(2)."""
        self._node(self._number(path)).mode = mode

    def readdir(self, path: str, handle: int) -> list[str]:
        """As readdir(3)."""
        return [".", "..", *self._folder(self._number(path)).entries]

    def mkdir(self, path: str, mode: int) -> None:
        """As mkdir(2)."""
        number = self._new_number()
        self._nodes[number] = Folder(self._platter / f"{number}.folder", self._luck)
        self._enter(path, number)

    def create(self, path: str, mode: int) -> int:
        """As creat(2)."""
        number = self._new_number()
        self._nodes[number] = File(self._platter / f"{number}.file", self._luck)
        self._enter(path, number)
        return number

    def unlink(self, path: str) -> None:
        """As unlink(2). The file stays for those who have it open, and on the disk for good."""
        folder, name = self._place(path)
        del folder.entries[name]
        folder.changed()

    def rename(self, old: str, new: str) -> None:
        """As rename(2)."""
        folder, name = self._place(old)
        self._enter(new, folder.entries.pop(name))
        folder.changed()

    def open(self, path: str, flags: int) -> int:
        """As open(2) of a file that is there."""
        number = self._number(path)
        if flags & os.O_TRUNC:
            self._file(number).truncate(0)
        return number

    def read(self, path: str, size: int, at: int, handle: int) -> bytes:
        """As pread(2)."""
        return self._file(handle).read(size, at)

    def write(self, path: str, data: bytes, at: int, handle: int) -> int:
        """As pwrite(2)."""
        self._file(handle).write(data, at)
        return len(data)

    def truncate(self, path: str, size: int, handle: int | None = None) -> None:
        """As truncate(2)."""
        self._file(handle or self._number(path)).truncate(size)

    def fsync(self, path: str, only_data: int, handle: int) -> None:
        """As fsync(2) and fdatasync(2)."""
        self._file(handle).sync()

    def fsyncdir(self, path: str, only_data: int, handle: int) -> None:
        """As fsync(2) of a folder."""
        self._folder(self._number(path)).sync()

    def _new_number(self) -> int:
        self._last += 1
        return self._last

    def _enter(self, path: str, number: int) -> None:
        folder, name = self._place(path)
        folder.entries[name] = number
        folder.changed()

    def _number(self, path: str) -> int:
        number = ROOT
        for name in PurePosixPath(path).parts[1:]:
            entries = self._folder(number).entries
            if name not in entries:
                raise OSError(ENOENT, path)
            number = entries[name]
        return number

    def _place(self, path: str) -> tuple[Folder, str]:
        parts = PurePosixPath(path)
        return self._folder(self._number(str(parts.parent))), parts.name

    def _node(self, number: int) -> File | Folder:
        if number not in self._nodes:
            folder = self._platter / f"{number}.folder"
            file = self._platter / f"{number}.file"
            self._nodes[number] = Folder(folder, self._luck) if folder.exists() else File(file, self._luck)
        return self._nodes[number]

    def _file(self, number: int) -> File:
        node = self._node(number)
        assert isinstance(node, File)
        return node

    def _folder(self, number: int) -> Folder:
        node = self._node(number)
        assert isinstance(node, Folder)
        return node


def end_with_our_parent() -> None:
    """Wait until who started us is gone."""
    sys.stdin.read()
    os._exit(0)


def main(mount: str, platter: str, early: str, seed: str) -> None:
    """Mount it, and serve until killed."""
    from mfusepy import FUSE  # type: ignore[import-untyped]  # It needs libfuse; the rest of this file does not.

    threading.Thread(target=end_with_our_parent, daemon=True).start()
    chance = random.Random(int(seed))
    disk = Volatile(Path(platter).resolve(), lambda: chance.random() < float(early))
    FUSE(disk, mount, foreground=True, nothreads=True, hard_remove=True, fsname="power_cut")


if __name__ == "__main__":
    main(*sys.argv[1:])
