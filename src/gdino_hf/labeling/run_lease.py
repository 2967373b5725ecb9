"""A place that one run at a time may write to, whichever machines it is on: a file there says whose it is.

Neither object stores nor all shared file systems have locks that other machines see. The holder rewrites its file again
and again, so the file of a run that died stops changing. Whoever wants the place watches for change and compares no
clocks, which differ between machines.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..model.printable import printable
from ..whole_files import is_gone, machine_name, whole_file
from .label_workers import WorkerError

LEASE = ".lock-owner"
"""Name of the file in the place."""

# Seconds between two signs of life, and how long none may be seen before a run counts as dead.
_BEAT = 20.0
_SILENCE = 90.0
# Seconds between two looks at the file of another run.
_LOOK = 2.0
# Seconds that a file must stay in a place where two runs may have written theirs at the same moment.
_SETTLE = 3.0


class RunLease:
    """The right to write to a place, held from `lease` until its `with` block ends.

    Args:
        system: File system of fsspec.
        path: The file, in that file system.
        shown: What the user calls the place.
    """

    def __init__(self, system: Any, path: str, shown: str) -> None:
        self._system, self._path, self._shown = system, path, shown
        self._is_local = "file" in system.protocol
        self._token, self._number = secrets.token_hex(16), 0
        self._taken_over, self._stopped = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gdino_hf-lease", daemon=True)

    def check(self) -> None:
        """Find out whether this run still has the place.

        Raises:
            WorkerError: Another run took it, because this one gave no sign of life for long.
        """
        if self._taken_over:
            raise WorkerError(
                f"another run went on in {printable(self._shown)}, because this one gave no sign of life for "
                f"{_SILENCE:.0f} seconds; let that one finish."
            )

    def take(self, say: Callable[[str], None]) -> None:
        """Take the place, after a wait if a run that may have died has it.

        Args:
            say: Function that is called with a line for the user before a wait.

        Raises:
            ValueError: Another run is at work there.
            OSError: The file cannot be written; file systems raise exceptions of further types.
        """
        may_be_shared = not self._is_local
        while (contents := self._read()) is not None:
            may_be_shared |= self._await_silence(contents, say)
            with suppress(FileNotFoundError):
                self._system.rm_file(self._path)
        try:
            self._write(is_new=True)
        except FileExistsError:
            raise self._refusal() from None
        if may_be_shared:
            time.sleep(_SETTLE)
        if not self._is_own(self._read()):
            raise self._refusal()
        self._thread.start()

    def give_back(self) -> None:
        """Let others have the place."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(Exception):
            if self._is_own(self._read()):
                self._system.rm_file(self._path)

    def _await_silence(self, contents: bytes, say: Callable[[str], None]) -> bool:
        """Return once the run that wrote the file is known to be dead, and whether that took a wait.

        Raises:
            ValueError: It is alive.
        """
        watch = LeaseWatch()
        if not watch.is_alive(contents):
            return False
        host = printable(_owner(contents).get("host", "another machine"))
        say(f"a run on {host} has {printable(self._shown)}; waiting up to {_SILENCE:.0f} s for a sign of life from it")
        while watch.is_alive(contents):
            time.sleep(_LOOK)
            now = self._read()
            if now is None:
                break
            if now != contents:
                raise self._refusal(host)
        return True

    def _refusal(self, host: str = "another machine") -> ValueError:
        return ValueError(
            f"Another run on {host} is at work in {printable(self._shown)}; wait for it, or choose another place."
        )

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT):
            # The network may be down for a while.
            with suppress(Exception):
                contents = self._read()
                if contents is not None and not self._is_own(contents):
                    self._taken_over = True
                    return
                self._write()

    def _read(self) -> bytes | None:
        self._system.invalidate_cache()
        try:
            contents: bytes = self._system.cat_file(self._path)
        except FileNotFoundError:
            return None
        return contents

    def _write(self, is_new: bool = False) -> None:
        """Write the file; in a folder, a new one is an error if there is one, and it is never seen in parts."""
        self._number += 1
        owner = {"token": self._token, "host": platform.node(), "machine": machine_name(), "process": os.getpid()}
        contents = json.dumps({**owner, "number": self._number}).encode()
        if not self._is_local:
            self._system.pipe_file(self._path, contents)
        elif is_new:
            with open(self._path, "xb") as file:
                file.write(contents)
        else:
            with whole_file(self._path, durable=False) as unfinished:
                unfinished.write_bytes(contents)

    def _is_own(self, contents: bytes | None) -> bool:
        return contents is not None and _owner(contents).get("token") == self._token


class LeaseWatch:
    """Tells whether the run that wrote a file is alive, by whether the file still changes."""

    def __init__(self) -> None:
        self._seen: bytes | None = None
        self._since = 0.0

    def is_alive(self, contents: bytes | None) -> bool:
        """Return whether the run is alive, or may be.

        Args:
            contents: What the file holds now; None if there is none.
        """
        if contents is None:
            return False
        owner = _owner(contents)
        # If there is a process of this number, it may be another one by now.
        if is_gone(str(owner.get("machine")), int(owner.get("process", 0))):
            return False
        if contents != self._seen:
            self._seen, self._since = contents, time.monotonic()
        return time.monotonic() - self._since < _SILENCE


@contextmanager
def lease(system: Any, path: str, shown: str, say: Callable[[str], None]) -> Iterator[RunLease]:
    """Hold a place during the `with` block.

    Args:
        system: File system of fsspec.
        path: The file, in that file system.
        shown: What the user calls the place.
        say: Function that is called with a line for the user before a wait.

    Raises:
        ValueError: Another run is at work there.
        OSError: The file cannot be written.
    """
    held = RunLease(system, path, shown)
    try:
        held.take(say)
        yield held
    finally:
        held.give_back()


def _owner(contents: bytes) -> dict[str, Any]:
    """Return what a file says; nothing if it is being written."""
    try:
        owner = json.loads(contents)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
