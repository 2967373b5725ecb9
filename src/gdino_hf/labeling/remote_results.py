"""Results at an address such as s3://bucket/labels: a run works in a folder here and sends its finished files there.

Object stores have neither renaming nor locks; a lease keeps other runs away. A file is sent when it is whole here, and
object stores show an object when it is whole there; the manifest that says that the run is finished is sent last. A run
that goes on, here or on another machine, first fetches what is there.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from ..whole_files import whole_file
from .label_results import LabelSummary
from .label_store import MANIFEST, PLAN, SHARDS
from .label_workers import WorkerError
from .run_lease import LEASE, RunLease
from .shard_files import read_counts

# Seconds between two looks at what is finished here.
_PATIENCE = 1.0
# Files that are on their way at a time.
_AT_ONCE = 8
# File systems that show a file only when it is there as a whole; in others it is sent under another name.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "memory"}


def is_address(out: str | Path) -> bool:
    """Return whether results go to an address and not into a folder."""
    return "://" in str(out)


@contextmanager
def working_folder(address: str, say: Callable[[str], None]) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Provide a folder for a run whose results go to an address, and send its files during the `with` block.

    The folder is removed at the end. If the block raises an exception, it stays, and the same address finds it again.

    Args:
        address: Address of any file system that fsspec knows and that can be written, without a slash at its end.
        say: Function that is called with a line for the user.

    Yields:
        The folder, and a function that raises `WorkerError` if another run took the address.

    Raises:
        ValueError: The address cannot be used, or another run uses it.
        WorkerError: Results cannot be sent.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME, "gdino-labels", hashlib.sha256(address.encode()).hexdigest()[:16])
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run is at work for {printable(address)}; wait for it, or choose another address."
        ) from None
    try:
        remote = RemoteFolder(address, folder, say)
        remote.check()
        with remote.leased() as check:
            remote.fetch()
            remote.start()
            try:
                yield folder, check
                check()
            except BaseException:
                remote.stop()
                raise
            remote.finish()
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def at_address(summary: LabelSummary, address: str, folder: Path) -> LabelSummary:
    """Return a run's summary with the address in the place of its folder here."""
    paths = {name: f"{address}/{Path(path).relative_to(folder).as_posix()}" for name, path in summary.formats.items()}
    return replace(summary, folder=address, formats=paths)


class RemoteFolder:
    """Copies the files of a folder to an address, from a thread, as they are finished.

    Args:
        address: The address.
        folder: The folder.
        say: Function that is called with a line for the user, once each time that files cannot be sent.

    Raises:
        ValueError: The address cannot be used.
    """

    def __init__(self, address: str, folder: Path, say: Callable[[str], None]) -> None:
        import fsspec

        self._address, self._folder, self._say = address, folder, say
        # Libraries of file systems raise exceptions of their own types.
        try:
            self._system, self._root = fsspec.core.url_to_fs(address)
        except Exception as error:
            raise ValueError(f"{printable(address)} cannot be used for results ({reason(error)}).") from error
        protocol = self._system.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._shows_whole_files = bool(names & _OBJECT_STORES)
        self._sent: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gdino_hf-sender", daemon=True)

    def check(self) -> None:
        """Find out before the work whether the address can be written.

        Raises:
            ValueError: It cannot.
        """
        name = f"{self._root}/.gdino-label-{secrets.token_hex(4)}"
        try:
            if not self._shows_whole_files:
                self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(name, b"1")
            self._system.rm_file(name)
        except Exception as error:
            raise ValueError(f"{printable(self._address)} cannot be written ({reason(error)}).") from error

    @contextmanager
    def leased(self) -> Iterator[Callable[[], None]]:
        """Keep other runs away from the address during the `with` block.

        On the Hub each sign of life would be a commit, so there runs are not kept apart.

        Yields:
            Function that raises `WorkerError` if another run took the address.

        Raises:
            ValueError: Another run uses the address, or it cannot be written.
        """
        if "hf" in self._system.protocol:
            yield lambda: None
            return
        held = RunLease(self._system, f"{self._root}/{LEASE}", self._address)
        try:
            held.take(self._say)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{printable(self._address)} cannot be written ({reason(error)}).") from error
        try:
            yield held.check
        finally:
            held.give_back()

    def fetch(self) -> None:
        """Fetch the files that are there and not here.

        What an earlier run left here is removed if it was not begun with the settings of the manifest there.

        Raises:
            ValueError: The address cannot be read.
        """
        try:
            there = self._listed()
            manifest = self._system.cat_file(f"{self._root}/{MANIFEST}") if MANIFEST in there else None
            if manifest is None or _settings(manifest) != _settings(self._own_manifest()):
                shutil.rmtree(self._folder, ignore_errors=True)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda pair: self._fetch(*pair), there.items()))
        except Exception as error:
            raise ValueError(f"{printable(self._address)} cannot be read ({reason(error)}).") from error

    def _listed(self) -> dict[str, int]:
        """Return size of each file at the address, by its path inside."""
        self._system.invalidate_cache()
        try:
            found = self._system.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        names = {name.removeprefix(self._root).lstrip("/"): entry["size"] for name, entry in found.items()}
        return {name: size for name, size in names.items() if name and not _is_hidden(name)}

    def _own_manifest(self) -> bytes | None:
        try:
            return (self._folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None

    def _fetch(self, name: str, size: int) -> None:
        path = self._folder / name
        if not path.exists():
            with whole_file(path, durable=False) as unfinished:
                self._system.get_file(f"{self._root}/{name}", str(unfinished))
            if name.startswith(f"{SHARDS}/") and not _is_whole(path):
                path.unlink()
                return
        elif path.stat().st_size != size or not name.startswith((f"{SHARDS}/", f"{PLAN}/")):
            # The one here is newer: it could not be sent before.
            return
        self._sent[name] = _state(path)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending, after what is finished was sent if that is possible."""
        self._stopped.set()
        self._thread.join()
        with suppress(Exception):
            self._send_all()

    def finish(self) -> None:
        """Send everything that was not sent, the manifest last, and remove the plan.

        Raises:
            WorkerError: It cannot be sent.
        """
        self._stopped.set()
        self._thread.join()
        try:
            self._send_all()
            self._send_file(MANIFEST)
            self._system.invalidate_cache()
            if self._system.exists(f"{self._root}/{PLAN}"):
                self._system.rm(f"{self._root}/{PLAN}", recursive=True)
        except Exception as error:
            raise WorkerError(
                f"the results cannot be sent to {printable(self._address)} ({reason(error)}); they are in "
                f"{printable(self._folder)}, and the same command sends them."
            ) from error

    def _run(self) -> None:
        was_sent = True
        while not self._stopped.wait(_PATIENCE):
            try:
                self._send_all()
                was_sent = True
            except Exception as error:
                if was_sent:
                    self._say(f"the results cannot be sent now ({reason(error)}); they are kept and sent later")
                was_sent = False

    def _send_all(self) -> None:
        """Send what is new, all but the manifest of a finished run."""
        manifest = self._own_manifest()
        if manifest is None:
            return
        if MANIFEST not in self._sent and not json.loads(manifest).get("finished"):
            self._send_file(MANIFEST)
        files = (path for path in sorted(self._folder.rglob("*")) if path.is_file())
        names = [path.relative_to(self._folder).as_posix() for path in files]
        names = [name for name in names if not _is_hidden(name) and name != MANIFEST]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            # What the shards were made with is there before any of them.
            for are_shards in (False, True):
                list(pool.map(self._send_file, [name for name in names if name.startswith(f"{SHARDS}/") == are_shards]))

    def _send_file(self, name: str) -> None:
        path = self._folder / name
        try:
            state = _state(path)
            if self._sent.get(name) == state:
                return
            self._put(path, f"{self._root}/{name}")
        except FileNotFoundError:
            if path.exists():
                raise
            # The plan is removed at the end of a run.
            return
        self._sent[name] = state

    def _put(self, path: Path, place: str) -> None:
        if self._shows_whole_files:
            self._system.put_file(str(path), place)
            return
        folder, name = str(PurePosixPath(place).parent), PurePosixPath(place).name
        unfinished = f"{folder}/.{secrets.token_hex(8)}.unfinished"
        self._system.makedirs(folder, exist_ok=True)
        self._system.put_file(str(path), unfinished)
        if self._system.exists(place):
            self._system.rm_file(place)
        self._system.mv(unfinished, f"{folder}/{name}")


def _settings(manifest: bytes | None) -> Any:
    if manifest is None:
        return None
    try:
        return json.loads(manifest)["settings"]
    except (ValueError, KeyError, TypeError):
        return None


def _is_whole(shard: Path) -> bool:
    try:
        read_counts(str(shard))
    # pyarrow raises exceptions of several types on damaged files.
    except Exception:
        return False
    return True


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
