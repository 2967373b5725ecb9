"""Pack photographs, weights and image backbone into one small archive, and train from it on another machine.

    python -m gdino_hf.recipes.nano_archive pack nano.zip --everyday everyday --wild wild --backbone csp_pan_head \\
        --start runs/mixed
    python -m gdino_hf.recipes.nano_archive train nano.zip --output runs/away --export runs/away-model --device cuda \\
        --minutes 8

A machine that is lent for minutes takes little data and gives little back. The first command writes an archive of 60 MB
at most. The second one unpacks it into the output folder and trains for eight minutes as `gdino_hf.recipes.nano_mixed`
does, which gets every other option. The exported model comes back, and a run continues from it with `--start`.

What the archive leaves out, and what that changes:

- Photographs are no larger than the model sees them, and compressed as far as the limit demands; `pack` says how far.
  Boxes are scaled with them. `RandomScaleCrop` enlarges parts of a photograph, which shows less detail then.
- Of the weights only those are packed that differ from the embedded model's, which the other machine has; the text
  encoder is usually the same. Weights are stored in float16.
- The optimizer's state stays behind: the training starts with a new one, and the learning rate warms up.
- The model and the classifier of `--region-model` stay behind: looking at all photographs takes them longer than eight
  minutes.
- Of both sets, only the training photographs are packed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import NANO
from ..data.coco import read_coco
from ..model.configuration_gdino import GDinoConfig
from ..model.csp_pan import CspPanBackbone
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from ..whole_files import whole_file, whole_folder
from . import nano_mixed
from .closed_set_teacher import DETECTOR_FILE
from .nano import export, half_weights
from .nano_rating import told_model

LIMIT_MB = 60
# Qualities of WebP, the best first; the first that fits is taken.
QUALITIES = (90, 80, 70, 65, 60, 55, 50, 45, 40, 35, 30, 25, 20)
# To choose a quality, every so many-th photograph is compressed.
_SAMPLED = 16
# Bytes of a zip archive for each file, beside its content and twice its path, and at its end.
_PER_FILE, _AT_END = 76, 22
WEIGHTS = "differing.safetensors"
# Beside what was unpacked: from which archive.
DIGEST = "archive.sha256"
# Folders in the archive, each an option of nano_mixed.
SETS, PARTS = ("everyday", "wild"), ("backbone", "start")


def shrink_picture(image: Image.Image, side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    """Return a picture as WebP.

    Args:
        image: The picture.
        side: Its longer side in pixels at most.
        quality: WebP's quality, 0 to 100.

    Returns:
        The file's content, and width and height of the picture in it.
    """
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue(), image.size


def shrink_set(content: Mapping[str, Any], rows: Any, side: int, quality: int, every: int = 1) -> dict[str, bytes]:
    """Return the photographs of a set as small pictures, with annotations that fit them.

    Args:
        content: Content of the set's COCO file.
        rows: Its rows, from `read_coco`.
        side: Longer side of a picture in pixels at most.
        quality: WebP's quality.
        every: Only every so many-th photograph, to estimate a size.

    Returns:
        Content of the files train.json and images/NUMBER.webp. Image ids, order, categories and what else the file
        says about a photograph stay; annotations keep box, name and crowd mark, and lose their segments.
    """
    entries = {entry["id"]: entry for entry in content["images"]}
    category_of: dict[str, Any] = {}
    for category in content["categories"]:
        category_of.setdefault(category["name"], category["id"])
    files: dict[str, bytes] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place in range(0, len(rows), every):
        row, name = rows[place], f"{place:06d}.webp"
        files[f"images/{name}"], (width, height) = shrink_picture(row["image"], side, quality)
        images.append({**entries[row["image_id"]], "file_name": name, "width": width, "height": height})
        across, down = width / row["image"].width, height / row["image"].height
        for (left, top, right, bottom), label, crowd in zip(row["boxes"], row["names"], row["crowd"], strict=True):
            box = [left * across, top * down, (right - left) * across, (bottom - top) * down]
            box = [round(value, 2) for value in box]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": row["image_id"],
                    "category_id": category_of[label],
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": int(crowd),
                }
            )
    files["train.json"] = json.dumps({**content, "images": images, "annotations": annotations}).encode()
    return files


def differing(model: GDinoForObjectDetection, known: GDinoForObjectDetection) -> dict[str, Tensor]:
    """Return the weights of a model, in float16, that another model does not have under the same name."""
    others = half_weights(known)
    return {
        name: weight
        for name, weight in half_weights(model).items()
        if name not in others or not torch.equal(weight, others[name])
    }


def write_parts(args: argparse.Namespace, folder: Path) -> int:
    """Write the start and the backbone as files, and return the longer side of the pictures that the start sees.

    Args:
        args: The options of `pack`.
        folder: The folder for both.
    """
    model, processor = told_model(argparse.Namespace(model=args.start, processor=None))
    processor.save_pretrained(folder / "start")
    model.config.save_pretrained(folder / "start")
    save_file(differing(model, GDinoForObjectDetection.from_pretrained(NANO)), folder / "start" / WEIGHTS)
    backbone = CspPanBackbone.from_pretrained(args.backbone)
    backbone.save_pretrained(folder / "backbone", state_dict=half_weights(backbone))
    (folder / "backbone" / DETECTOR_FILE).write_bytes((Path(args.backbone) / DETECTOR_FILE).read_bytes())
    size = processor.image_processor.size
    return max(value for name, value in size.items() if name != "shortest_edge" or len(size) == 1)


def compression_of(path: str) -> int:
    """Return how zip stores a file: annotations compressed; photographs and weights cannot be compressed further."""
    return zipfile.ZIP_DEFLATED if path.endswith(".json") else zipfile.ZIP_STORED


def packed_size(files: Mapping[str, bytes]) -> int:
    """Return the bytes that files take up in a zip archive, without its end."""
    room = 0
    for path, content in files.items():
        packed = zlib.compress(content) if compression_of(path) == zipfile.ZIP_DEFLATED else content
        room += _PER_FILE + 2 * len(path) + len(packed)
    return room


def shrink_sets(args: argparse.Namespace, side: int, room: int) -> tuple[dict[str, bytes], int]:
    """Return the photographs of both sets at the highest quality that fits.

    Args:
        args: The options of `pack`.
        side: Longer side of a picture in pixels at most.
        room: Bytes that the archive has left for them.

    Returns:
        The files' contents by path, and the quality.

    Raises:
        ValueError: They do not fit at any quality.
    """

    sets = {}
    for name in SETS:
        file = Path(getattr(args, name)) / "train.json"
        sets[name] = json.loads(file.read_text(encoding="utf-8")), read_coco(file)

    def at(quality: int, every: int = 1) -> dict[str, bytes]:
        return {
            f"{name}/{path}": packed
            for name, (content, rows) in sets.items()
            for path, packed in shrink_set(content, rows, side, quality, every).items()
        }

    for quality in QUALITIES:
        # Each set's sample holds one photograph of _SAMPLED, rounded up.
        sample = at(quality, _SAMPLED)
        most = sum(path.endswith(".webp") for path in sample) * _SAMPLED
        if packed_size(sample) * (most - len(SETS) * _SAMPLED) / most * _SAMPLED > room * 1.05:
            continue
        files = at(quality)
        if packed_size(files) <= room:
            return files, quality
    raise ValueError(
        f"At a WebP quality of {QUALITIES[-1]} and {side} pixels, the photographs do not fit into the "
        f"{room / 1e6:.1f} MB that weights and settings leave; raise --megabytes, or pack fewer photographs."
    )


def pack(args: argparse.Namespace) -> str:
    """Write the archive.

    Args:
        args: The command line's options.

    Returns:
        What was packed, in one sentence.

    Raises:
        ValueError: It does not fit into `args.megabytes`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = write_parts(args, folder)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    parts = packed_size(files) + _AT_END
    pictures, quality = shrink_sets(args, side, int(args.megabytes * 1e6) - parts)
    with whole_file(args.archive) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for path, content in sorted({**files, **pictures}.items()):
            # Without a date, equal content gives equal archives.
            archive.writestr(zipfile.ZipInfo(path), content, compression_of(path))
    count = sum(path.endswith(".webp") for path in pictures)
    return (
        f"{args.archive} has {Path(args.archive).stat().st_size / 1e6:.1f} MB: {count} photographs of at most {side} "
        f"pixels at a WebP quality of {quality}, and {parts / 1e6:.1f} MB of weights and settings in float16."
    )


def unpack(archive: str | Path, folder: Path) -> None:
    """Unpack an archive of `pack`, if that was not done before; its start becomes a whole model again.

    Args:
        archive: The archive.
        folder: The folder for everyday, wild, backbone and start.

    Raises:
        ValueError: The file is no such archive, or the folder holds something else.
    """
    digest = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    if folder.is_dir():
        if not (folder / DIGEST).is_file() or (folder / DIGEST).read_text(encoding="ascii") != digest:
            raise ValueError(f"{folder} does not hold what {archive} holds; choose another --output.")
        return
    with whole_folder(folder) as unfinished:
        try:
            with zipfile.ZipFile(archive) as file:
                file.getinfo(f"start/{WEIGHTS}")
                file.extractall(unfinished)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{archive} is not an archive that `nano_archive pack` wrote; pack it again.") from error
        (unfinished / DIGEST).write_text(digest, encoding="ascii")
        start = unfinished / "start"
        model = GDinoForObjectDetection(GDinoConfig.from_pretrained(start))
        known = GDinoForObjectDetection.from_pretrained(NANO).state_dict()
        known = {name: known[name] for name in model.state_dict() if name in known}
        model.load_state_dict({**known, **load_file(start / WEIGHTS)})
        (start / WEIGHTS).unlink()
        export(model, GDinoProcessor.from_pretrained(start), start)


def train(args: argparse.Namespace, others: Sequence[str]) -> None:
    """Unpack the archive and train from it, or resume.

    Args:
        args: The command line's options.
        others: Options of `gdino_hf.recipes.nano_mixed`.

    Raises:
        ValueError: The options name data that the archive brings, or the archive cannot be used.
    """
    for name in (*SETS, *PARTS):
        if any(option == f"--{name}" or option.startswith(f"--{name}=") for option in others):
            raise ValueError(f"--{name} comes with the archive; leave it out.")
    folder = Path(args.output) / "archive"
    unpack(args.archive, folder)
    given = [part for name in (*SETS, *PARTS) for part in (f"--{name}", str(folder / name))]
    nano_mixed.main([*given, "--output", args.output, *others])


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line's options; those that are left are nano_mixed's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write an archive")
    packing.add_argument("archive", help="the zip file to write")
    packing.add_argument("--everyday", required=True, help="as in nano_mixed")
    packing.add_argument("--wild", required=True, help="as in nano_mixed")
    packing.add_argument("--backbone", required=True, help="as in nano_mixed")
    packing.add_argument("--start", default="nano", help="as in nano_mixed")
    packing.add_argument("--megabytes", type=float, default=LIMIT_MB, help="largest size of the archive, in 10^6 bytes")
    training = commands.add_parser("train", help="unpack an archive and train; all other options are nano_mixed's")
    training.add_argument("archive", help="the zip file")
    training.add_argument("--output", required=True, help="folder for checkpoints, log and the unpacked archive")
    options, others = parser.parse_known_args(arguments)
    if others and options.command == "pack":
        parser.error(f"pack does not know {others[0]}")
    return options, others


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack an archive, or train from one."""
    options, others = parse_arguments(arguments)
    if options.command == "pack":
        print(pack(options))
    else:
        train(options, others)


if __name__ == "__main__":
    main()
