"""Draw a video in which the examples' cat and person move, with the truth about them as MOT Challenge has it.

    python examples/draw_a_video.py clip.mp4 --kind crossings --frames 100

Beside clip.mp4 it writes clip.txt: frame, id, left, top, width, height, 1, class, visible part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from gdino_hf.recipes.moving_scenes import KINDS, MovingScenes, cutout
from gdino_hf.video.video_writing import VideoWriter

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "demo" / "examples"
RATE = 25


def cutouts() -> list[tuple[str, Image.Image]]:
    """Return the labels and pictures of the cat and the person in the examples."""
    content = json.loads((PHOTOGRAPHS / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    found = []
    for row in content["annotations"]:
        left, top, width, height = row["bbox"]
        picture = Image.open(PHOTOGRAPHS / files[row["image_id"]])
        found.append((names[row["category_id"]], cutout(picture, (left, top, left + width, top + height))))
    return [(name, picture) for name, picture in found if name in ("cat", "person")]


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path, help="MP4 file to write")
    parser.add_argument("--kind", choices=KINDS, default="crossings", help="what makes it hard")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    ground = Image.new("RGB", (480, 360), (60, 70, 90))
    scene = MovingScenes(
        [ground],
        cutouts(),
        kind=args.kind,
        seed=args.seed,
        frames=args.frames,
        size=ground.size,
        objects=2,
        labels=2,
        scale=0.5,
    )
    writer = VideoWriter(args.video, RATE)
    lines = []
    for number, (image, objects) in enumerate(scene):
        writer.add(image, number / RATE)
        for each in objects:
            left, top, right, bottom = each.box
            place = f"{left + 1},{top + 1},{right - left},{bottom - top}"
            label = scene.labels.index(each.label) + 1
            lines.append(f"{number + 1},{each.identity},{place},1,{label},{each.visible:.2f}\n")
    writer.close()
    args.video.with_suffix(".txt").write_text("".join(lines))
    print(f"{args.video}: {args.frames} frames with {', '.join(scene.labels)}")


if __name__ == "__main__":
    main()
