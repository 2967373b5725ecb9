"""`python -m gdino_hf.runtime DIR PICTURES --labels cat cup`: detect with an exported model, and write JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdino_hf.model.printable import printable
from gdino_hf.runtime import DetectionError, Detector


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name (default: those of the process).

    Returns:
        The exit status: 0; 1 if a picture could not be read; 2 if the folder, the labels or the options cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m gdino_hf.runtime", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="folder that gdino export wrote")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="file or http(s) address")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="what to look for (default: labels baked in)")
    parser.add_argument("--threshold", type=float, default=0.3, help="score to exceed, 0..1 (default: %(default)s)")
    parser.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="drop boxes of one label that overlap more; 1 keeps all (default: as the model's processor says)",
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="largest number of boxes in a picture")
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads (default: the library's choice)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default: print it)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for pictures with their boxes")
    args = parser.parse_args(argv)
    try:
        detector = Detector(args.folder, threads=args.threads)
        labels = args.labels[0] if args.labels and len(args.labels) == 1 else args.labels
        options = {"threshold": args.threshold, "nms_threshold": args.nms, "top_k": args.top_k}
        results = detector.stream(args.pictures, labels, **options)
        plots = _plot_files(args.pictures, args.plots)
        rows = [_row(source, found, plot) for (source, found), plot in zip(results, plots, strict=True)]
        report = json.dumps({"images": rows}, ensure_ascii=False, indent=2)
        if args.out is None:
            print(report)
        else:
            args.out.write_text(report + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {printable(error)}", file=sys.stderr)
        return 2
    return 1 if any("error" in row for row in rows) else 0


def _plot_files(pictures: Sequence[str], folder: Path | None) -> list[Path | None]:
    """Return the file of each picture with its boxes, of which no two are the same; None without a folder.

    Raises:
        ValueError: One of them is a picture that is looked at.
    """
    if folder is None:
        return [None] * len(pictures)
    own = {Path(picture).resolve() for picture in pictures}
    used: set[str] = set()
    files: list[Path | None] = []
    for picture in pictures:
        stem = Path(picture).stem
        name = next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, len(pictures) + 2))) if name not in used)
        used.add(name)
        file = folder / f"{name}.jpg"
        if file.resolve() in own:
            raise ValueError(f"--plots {folder} would replace {file}; choose another folder.")
        files.append(file)
    return files


def _row(source: str, found: Any, plot: Path | None) -> dict[str, Any]:
    """Return what the report says of one picture, and draw its boxes if there is a file for that."""
    if isinstance(found, DetectionError):
        print(printable(found), file=sys.stderr)
        return {"image": source, "error": str(found)}
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        found.plot().save(plot)
    detections = [
        {"label": text, "score": round(score, 4), "box": [round(side, 2) for side in box]}
        for box, score, _, text in found
    ]
    return {"image": source, "width": found.size[0], "height": found.size[1], "detections": detections}


if __name__ == "__main__":
    sys.exit(main())
