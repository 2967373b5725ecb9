"""What there is to label, in one order: files, folders, data sets, globs, lists, archives, here and at addresses."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..data.folder_files import NOT_READ, FolderFiles, foreign_kind, is_picture
from ..data.forms import is_hub_id
from ..data.object_tables import HUB
from ..data.places import SHARDS, split_place
from ..data.set_pictures import RecognizedSet, recognized_set
from ..data.tar_shards import shard_paths
from ..error_text import reason
from ..model.picture_formats import FOREIGN_SUFFIXES, PICTURE_SUFFIXES, READABLE
from ..model.printable import printable
from .data_set_sources import set_items
from .picture_archives import PARQUET_SUFFIX, TAR_SUFFIXES, is_archive, open_any, parquet_rows, tar_members
from .source_items import Key, SeenSources, SourceItem

LIST_SUFFIX = ".txt"
_WEB = ("http://", "https://")


class Sources:
    """The pictures that a user names, listed in the same order each time.

    A picture that several arguments name is listed once.

    Args:
        arguments: Files, folders (with sub-folders and the archives in them), globs, text files with a path or address
            a line, tar and Parquet files, addresses of any file system that fsspec knows, ids of data sets on the Hub;
            folders and files of data sets, of which the pictures of all splits are meant, or those of one that is named
            after a colon.
        exclude: Folder of results, which is passed over.

    Attributes:
        remarks: After listing, a line for each data set that was recognized and for each folder with files that are
            left out.

    Raises:
        ValueError: There is no argument, or the folder of results is one.
    """

    def __init__(self, arguments: Sequence[str], exclude: Path | None = None) -> None:
        if not arguments:
            raise ValueError("There is no source; name files, folders, lists, archives or addresses.")
        self.arguments = [_absolute(argument) for argument in arguments]
        # What may as well be a path that is not there.
        self._ids = {HUB + argument: argument for argument in arguments}
        self.remarks: list[str] = []
        self._sets: dict[str, RecognizedSet | None] = {}
        self._exclude = None if exclude is None else exclude.resolve()
        if self._exclude in [Path(argument).resolve() for argument in self.arguments if "://" not in argument]:
            raise ValueError(f"{exclude} is one of the sources; choose another folder for the results.")

    def check(self) -> None:
        """Find out before the work whether every argument names something.

        Raises:
            ValueError: One does not.
        """
        for argument in self.arguments:
            if "://" in argument or _is_there(split_place(argument)[0]) or _tars(argument):
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
        seen = SeenSources()
        for number, argument in enumerate(self.arguments):
            try:
                names_once = self._names_once()
                for inner, item in self._of(argument, seen):
                    key = (f"{number:06d}", *inner)
                    if not names_once and not seen.add(item.source):
                        continue
                    if after is None or key > after:
                        yield key, item
            except (OSError, ImportError, tarfile.TarError, ValueError) as error:
                why = reason(error, name_file=True)
                if argument in self._ids:
                    shown = printable(self._ids[argument])
                    raise ValueError(
                        f"{shown} is not there, and as a data set of the Hub it cannot be listed ({why})."
                    ) from error
                raise ValueError(f"{printable(argument)} cannot be listed ({why}).") from error

    def _names_once(self) -> bool:
        """Return whether no picture is named twice: a folder lists each file once; other sources may not."""
        only = self.arguments[0]
        return not (len(self.arguments) > 1 or _is_list(only) or _is_glob(only) or self._set_of(only) is not None)

    def _set_of(self, argument: str) -> RecognizedSet | None:
        """Return the data set that an argument is, unless its pictures lie in archives, which are listed as such."""
        if "://" in argument or _is_glob(argument):
            return None
        if argument not in self._sets:
            self._sets[argument] = recognized_set(argument)
        found = self._sets[argument]
        return None if found is None or not found.parts else found

    def _of(self, argument: str, seen: SeenSources) -> Iterator[tuple[Key, SourceItem]]:
        tars = _tars(argument)
        if tars:
            return _of_tars(tars)
        if "://" in argument:
            return self._of_address(argument)
        recognized = self._set_of(argument)
        if recognized is not None:
            return set_items(recognized, argument, seen, self._exclude, self.remarks)
        path = Path(argument)
        if path.is_dir():
            return self._of_folder(path, argument)
        if path.exists():
            return _of_file(argument, read_list=True)
        return self._of_glob(argument)

    def _of_glob(self, pattern: str) -> Iterator[tuple[Key, SourceItem]]:
        """List what matches a pattern: all pictures of folders, whatever data set they are, and files."""
        counts, walked = FolderFiles(), set[Path]()
        for match in sorted(glob.iglob(pattern, recursive=True)):
            path = Path(match)
            if not walked.isdisjoint(path.parents):
                continue
            if path.is_dir():
                walked.add(path)
                found = self._of_folder(path, match)
            else:
                found = _of_match(match, counts)
            for inner, item in found:
                yield (match, *inner), item
        self._left_out(counts, pattern)

    def _of_folder(self, folder: Path, shown: str) -> Iterator[tuple[Key, SourceItem]]:
        counts, found = FolderFiles(), self._sets.get(shown)
        loose = 0
        for key, item in self._walk(folder, (), counts):
            loose += item.place is None
            yield key, item
        if found is not None and not loose:
            self.remarks.append(f"{printable(shown)} is {found.title}: all pictures in it are labelled")
        self._left_out(counts, shown)

    def _left_out(self, counts: FolderFiles, shown: str) -> None:
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
        self._left_out(counts, address)


def _absolute(argument: str) -> str:
    """Return an argument as an absolute path or an address."""
    if SHARDS in argument:
        return SHARDS.join(map(_absolute, argument.split(SHARDS)))
    if "://" in argument:
        return argument
    path = os.path.abspath(os.path.expanduser(argument))
    return f"{HUB}{argument}" if is_hub_id(argument) and not _is_there(path) else path


def _is_there(path: str) -> bool:
    """Return whether a path or a pattern names something."""
    try:
        return os.path.lexists(path) or next(glob.iglob(path, recursive=True), None) is not None
    except (OSError, ValueError):
        # A name that is too long, or with a null character.
        return False


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


def _of_match(file: str, counts: FolderFiles) -> Iterator[tuple[Key, SourceItem]]:
    """List a file that a pattern matches, unless it is no picture, which is counted."""
    fault = _file_fault(Path(file))
    if fault is None:
        counts.others += 1
    elif fault:
        yield (), SourceItem(file, fault=fault)
    else:
        yield from _of_file(file)


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


def _tars(argument: str) -> list[str]:
    """Return the tar files that a pattern with {000..012} or a list joined by :: stands for; none for anything else."""
    if not ({"{", "}"} <= set(argument) or SHARDS in argument) or os.path.lexists(argument):
        return []
    return shard_paths(argument)


def _of_tars(archives: Sequence[str]) -> Iterator[tuple[Key, SourceItem]]:
    for number, archive in enumerate(archives):
        for inner, item in _of_tar(archive):
            yield (f"{number:09d}", *inner), item


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
