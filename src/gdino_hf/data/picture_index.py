"""The pictures that the annotation files of a folder mean, found by the name they state or by their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..model.picture_formats import PICTURE_SUFFIXES
from ..model.text_prompt import shorten
from .annotation_options import AnnotationOptions
from .faults import OUTSIDE, Findings, Report
from .picture_sets import files_of, is_inside, relative_name
from .rows import is_file


class PictureIndex:
    """Finds the picture of an annotation file.

    Args:
        folders: Folders of pictures, the preferred one first.
        root: The data set's folder, which pictures must lie in.
        options: Conventions of the data set, which say whether pictures may lie elsewhere.
    """

    def __init__(self, folders: Sequence[Path], root: Path, options: AnnotationOptions) -> None:
        self.folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()] or list(folders[:1])
        self.root, self.options = root, options
        self._by_stem: dict[str, Path] | None = None
        self._used: set[Path] = set()

    def find(self, stated: str | None, file: Path, report: Report, where: str) -> Path | None:
        """Return the picture of an annotation file; None if the name that it states leads outside.

        Args:
            stated: Name of the picture in the file, often that on the annotator's machine.
            file: The annotation file, whose name without its ending the picture may have.
            report: Function that such a name is passed to.
            where: The annotation file, for the report.
        """
        name = (stated or "").strip().replace("\\", "/")
        folders = self._folders_for(file)
        places = [folder / name for folder in folders] if name else []
        allowed = [place for place in places if self._is_allowed(place)]
        found = next((place for place in allowed if is_file(place)), None)
        if found is None and name:
            last = PurePosixPath(name).name
            found = next((place / last for place in folders if is_file(place / last)), None)
        if found is None:
            found = self._stems().get(file.stem)
        if found is None and places and not allowed:
            report(OUTSIDE, f"{where}: its path {shorten(name)} leads outside the data set's folder")
            return None
        if found is None:
            found = allowed[0] if allowed else self.folders[0] / file.with_suffix(".jpg").name
        self._used.add(found)
        return found

    def _folders_for(self, file: Path) -> list[Path]:
        """Return where to look for a picture: beside the file, in the sub-folder that is called like the file's, ..."""
        try:
            parts = file.parent.relative_to(self.root).parts
        except ValueError:
            parts = ()
        alike = [folder.joinpath(*parts[1:]) for folder in self.folders] if len(parts) > 1 else []
        return [file.parent, *alike, *self.folders]

    def _is_allowed(self, place: Path) -> bool:
        return self.options.paths == "anywhere" or is_inside(place, [self.root, *self.folders])

    def _stems(self) -> dict[str, Path]:
        if self._by_stem is None:
            self._by_stem = {}
            for folder in self.folders:
                for path in files_of(folder, *PICTURE_SUFFIXES):
                    self._by_stem.setdefault(path.stem, path)
        return self._by_stem

    def report_unused(self, base: str, findings: Findings) -> None:
        """Report the pictures that no annotation file means."""
        used = {path.resolve() for path in self._used}
        for path in self._stems().values():
            if path.resolve() not in used:
                findings.add("pictures without annotations", shorten(relative_name(path, base)))
