"""What there is to label, in one order: files, folders, globs, lists, tar and Parquet files, here and at addresses."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.folder_files import NOT_READ, FolderFiles, foreign_kind, is_picture
from ..error_text import reason
from ..model.picture_formats import FOREIGN_SUFFIXES, PICTURE_SUFFIXES, READABLE
from ..model.printable import printable
from .picture_archives import PARQUET_SUFFIX, TAR_SUFFIXES, is_archive, open_any, parquet_rows, tar_members

LIST_SUFFIX = ".txt"
_WEB = ("http://", "https://")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Key = tuple[str, ...]
"""Place of a picture in the order of its run; keys grow."""


@dataclass(frozen=True)
class SourceItem:
    """One picture to label.

    Attributes:
        source: Its unique name: absolute path or address; inside an archive, the archive's, a slash and the name there.
        place: Where its content is, if `source` is neither path nor address: ("tar", archive, first byte, size) or
            ("parquet", file, column, row group, row).
        fault: Reason why it cannot be read, if listing found one.
    """

    source: str
    place: tuple[Any, ...] | None = None
    fault: str | None = None

    def as_json(self) -> list[Any]:
        """Return a list that JSON can hold."""
        return [self.source, None if self.place is None else list(self.place), self.fault]

    @classmethod
    def of_json(cls, value: Sequence[Any]) -> SourceItem:
        """Return the item of such a list."""
        source, place, fault = value
        return cls(source, None if place is None else tuple(place), fault)


class Sources:
    """The pictures that a user names, listed in the same order each time.

    A picture that several arguments name is listed once.

    Args:
        arguments: Files, folders (with sub-folders and the archives in them), globs, text files with a path or address
            a line, tar and Parquet files, addresses of any file system that fsspec knows, ids of data sets on the Hub.
        exclude: Folder of results, which is passed over.

    Attributes:
        remarks: After listing, a line for each folder with files that are left out.

    Raises:
        ValueError: There is no argument, or the folder of results is one.
    """

    def __init__(self, arguments: Sequence[str], exclude: Path | None = None) -> None:
        if not arguments:
            raise ValueError("There is no source; name files, folders, lists, archives or addresses.")
        self.arguments = [_absolute(argument) for argument in arguments]
        self.remarks: list[str] = []
        self._exclude = None if exclude is None else exclude.resolve()
        if self._exclude in [Path(argument).resolve() for argument in self.arguments if "://" not in argument]:
            raise ValueError(f"{exclude} is one of the sources; choose another folder for the results.")
        # A folder lists each file once; several arguments and lists may name one twice.
        self._names_once = len(arguments) == 1 and not _is_list(self.arguments[0]) and not _is_glob(self.arguments[0])

    def check(self) -> None:
        """Find out before the work whether every argument names something.

        Raises:
            ValueError: One does not.
        """
        for argument in self.arguments:
            if "://" in argument or _is_there(argument):
                continue
            shown = printable(argument, limit=200)
            if glob.has_magic(argument):
                raise ValueError(f"{shown} matches nothing; quote the pattern, and check it.")
            raise ValueError(f"{shown} is not there; name a file, a folder, a list, an archive or an address.")

    def items(self, after: Key | None = None) -> Iterator[tuple[Key, SourceItem]]:
        """List the pictures with their keys.

        Args:
            after: Key of the last picture that was listed before; None lists all. Pictures that came or went since do
                not shift the others.

        Raises:
            ValueError: A source cannot be listed.
        """
        self.remarks = []
        seen: set[bytes] = set()
        for number, argument in enumerate(self.arguments):
            try:
                for inner, item in self._of(argument):
                    key = (f"{number:06d}", *inner)
                    if not self._names_once:
                        digest = hashlib.blake2b(os.fsencode(_identity(item.source)), digest_size=12).digest()
                        if digest in seen:
                            continue
                        seen.add(digest)
                    if after is None or key > after:
                        yield key, item
            except (OSError, ImportError, tarfile.TarError, ValueError) as error:
                why = reason(error, name_file=True)
                raise ValueError(f"{printable(argument)} cannot be listed ({why}).") from error

    def _of(self, argument: str) -> Iterator[tuple[Key, SourceItem]]:
        if "://" in argument:
            return self._of_address(argument)
        path = Path(argument)
        if path.is_dir():
            return self._of_folder(path, argument)
        if path.exists():
            return _of_file(argument, read_list=True)
        return self._of_glob(argument)

    def _of_glob(self, pattern: str) -> Iterator[tuple[Key, SourceItem]]:
        for match in sorted(glob.iglob(pattern, recursive=True)):
            path = Path(match)
            found = self._of_folder(path, match) if path.is_dir() else _of_file(match)
            for inner, item in found:
                yield (match, *inner), item

    def _of_folder(self, folder: Path, shown: str) -> Iterator[tuple[Key, SourceItem]]:
        counts = FolderFiles()
        yield from self._walk(folder, (), counts)
        line = counts.left_out(shown)
        if line is not None and line not in self.remarks:
            self.remarks.append(line)

    def _walk(self, folder: Path, inside: Key, counts: FolderFiles) -> Iterator[tuple[Key, SourceItem]]:
        """List a folder in the order of the names in it; links to folders are not followed."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            yield inside, SourceItem(str(folder), fault=f"the folder cannot be read ({reason(error)})")
            return
        for entry in found:
            path, key = folder / entry.name, (*inside, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if path.resolve() != self._exclude:
                    yield from self._walk(path, key, counts)
                continue
            fault = _file_fault(path)
            if any(part.startswith(".") for part in key):
                counts.hidden += 1
            elif fault == "" and is_archive(entry.name):
                for inner, item in _of_archive_in_folder(str(path), counts):
                    yield (*key, *inner), item
            elif fault is None:
                counts.others += 1
            else:
                yield key, SourceItem(str(path), fault=fault or None)

    def _of_address(self, address: str) -> Iterator[tuple[Key, SourceItem]]:
        if address.lower().startswith(_WEB):
            yield from _of_file(address, read_list=True)
            return
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(address)
            is_file = not _is_glob(path) and system.isfile(path)
            names = [] if is_file else sorted(system.glob(path) if _is_glob(path) else system.find(path))
        except Exception as error:
            # The library of a cloud has errors of its own, for instance for missing credentials.
            raise ValueError(reason(error)) from error
        if is_file:
            yield from _of_file(address, read_list=True)
            return
        if not names:
            raise ValueError("there is nothing at this address")
        counts = FolderFiles()
        for name in names:
            if is_archive(name):
                for inner, item in _of_archive_in_folder(system.unstrip_protocol(name), counts):
                    yield (name, *inner), item
            elif name.lower().endswith(PICTURE_SUFFIXES):
                yield (name,), SourceItem(system.unstrip_protocol(name))
            else:
                counts.others += 1
        line = counts.left_out(address)
        if line is not None:
            self.remarks.append(line)


def _absolute(argument: str) -> str:
    """Return an argument as an absolute path or an address."""
    if "://" in argument:
        return argument
    path = os.path.abspath(os.path.expanduser(argument))
    is_name = not argument.lower().endswith((*PICTURE_SUFFIXES, LIST_SUFFIX)) and not is_archive(argument)
    if is_name and _HUB_ID.fullmatch(argument) and not _is_there(path):
        return f"hf://datasets/{argument}"
    return path


def _is_there(path: str) -> bool:
    """Return whether a path or a pattern names something."""
    try:
        return os.path.lexists(path) or next(glob.iglob(path, recursive=True), None) is not None
    except (OSError, ValueError):
        # A name that is too long, or with a null character.
        return False


def _identity(source: str) -> str:
    """Return a key that is equal for all spellings of one file's path; a link to a picture is a picture of its own."""
    if "://" in source:
        return source
    folder, name = os.path.split(source)
    return os.path.join(_resolved(folder), name)


@functools.lru_cache(maxsize=1024)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def _is_list(argument: str) -> bool:
    return argument.lower().endswith(LIST_SUFFIX)


def _is_glob(argument: str) -> bool:
    return glob.has_magic(argument) and not os.path.lexists(argument)


def _file_fault(path: Path) -> str | None:
    """Return the reason why a file of a folder is no picture to read; "" for none, None for no picture at all."""
    suffix = path.suffix.lower()
    if not path.exists():
        named = suffix in (*PICTURE_SUFFIXES, *FOREIGN_SUFFIXES)
        return f"this link leads nowhere ({os.readlink(path)})" if named and path.is_symlink() else None
    if not path.is_file():
        return None
    if is_archive(path.name) or is_picture(path):
        return ""
    foreign = foreign_kind(path)
    return None if foreign is None else NOT_READ.format(foreign)


def _of_file(address: str, read_list: bool = False) -> Iterator[tuple[Key, SourceItem]]:
    """List a file that was named: an archive, a list, or else a picture."""
    name = address.lower().partition("?")[0] if address.lower().startswith(_WEB) else address.lower()
    if name.endswith(TAR_SUFFIXES):
        yield from _of_tar(address)
    elif name.endswith(PARQUET_SUFFIX):
        yield from _of_parquet(address)
    elif read_list and name.endswith(LIST_SUFFIX):
        yield from _of_list(address)
    else:
        yield (), SourceItem(address)


def _of_tar(archive: str) -> Iterator[tuple[Key, SourceItem]]:
    for number, (name, start, size) in enumerate(tar_members(archive)):
        yield (f"{number:012d}",), SourceItem(f"{archive}/{name}", ("tar", archive, start, size))


def _of_parquet(file: str) -> Iterator[tuple[Key, SourceItem]]:
    for name, column, group, row in parquet_rows(file):
        yield (name,), SourceItem(f"{file}/{name}", ("parquet", file, column, group, row))


def _of_archive_in_folder(archive: str, counts: FolderFiles) -> Iterator[tuple[Key, SourceItem]]:
    """List an archive that lies in a folder; a damaged one is a fault, and a table without pictures is left out."""
    of: Callable[[str], Iterator[tuple[Key, SourceItem]]]
    of = _of_parquet if archive.lower().endswith(PARQUET_SUFFIX) else _of_tar
    key: Key = ()
    try:
        for key, item in of(archive):
            yield key, item
    except (OSError, tarfile.TarError, ValueError) as error:
        if "no column of it holds pictures" in str(error):
            counts.others += 1
            return
        yield (*key, "~"), SourceItem(archive, fault=f"the rest of the archive cannot be listed ({reason(error)})")


def _of_list(file: str) -> Iterator[tuple[Key, SourceItem]]:
    """List a text file with a path or address a line; paths are relative to the file's folder."""
    folder = file.rpartition("/")[0] if "://" in file else os.path.dirname(file)
    with open_any(file) as opened:
        for number, line in enumerate(opened):
            text = os.fsdecode(line).strip().removeprefix("\ufeff")
            if not text:
                continue
            if "://" in text:
                source = text
            elif "://" in file:
                source = f"{folder}/{text}"
            else:
                source = os.path.abspath(os.path.join(folder, os.path.expanduser(text)))
            suffix = os.path.splitext(source)[1].lower()
            fault = NOT_READ.format(f"a picture of the kind {suffix}") if suffix in FOREIGN_SUFFIXES else None
            yield (f"{number:012d}",), SourceItem(source, fault=fault)


def nothing_found(arguments: Sequence[str]) -> str:
    """Return the sentence for sources without a single picture."""
    names = ", ".join(printable(argument, limit=100) for argument in arguments[:3])
    more = f" and {len(arguments) - 3} more" if len(arguments) > 3 else ""
    return f"There are no pictures in {names}{more}; {READABLE} are read."
