"""Generated scenes: coloured shapes of many sizes with exact boxes, for experiments that need no photographs.

A name is a pair of a colour and a shape, such as "red circle". A quarter of the pairs is held out (UNSEEN). A model
trained on the others (SEEN) knows every colour and every shape, but never saw the held-out pairs together, so it can
detect those only by reading the words.
"""

from __future__ import annotations

import cmath
import colorsys
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]

# Hue in degrees; saturation and value in [0, 1].
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.90, 0.88),
    "orange": (30, 0.95, 0.97),
    "yellow": (56, 0.90, 0.97),
    "green": (125, 0.80, 0.70),
    "cyan": (184, 0.85, 0.92),
    "blue": (226, 0.88, 0.90),
    "purple": (276, 0.75, 0.72),
    "pink": (330, 0.55, 0.97),
}
# In degrees. The closest two hues are 26 degrees apart, so jittered colours stay distinct.
HUE_JITTER = 6.0
VALUE_JITTER = 0.08
# Below the saturation of every shape.
BACKGROUND_SATURATION = 0.12
# Random positions tried for a shape before it is left out of the scene.
ATTEMPTS = 20


def _wheel(radii: Sequence[float], count: int) -> list[Point]:
    """Corners at equal angles, starting at the top; `radii` repeat around the centre."""
    angles = [2 * math.pi * index / count - math.pi / 2 for index in range(count)]
    return [
        (radii[index % len(radii)] * math.cos(angle), radii[index % len(radii)] * math.sin(angle))
        for index, angle in enumerate(angles)
    ]


# Outlines centred on the origin; a second outline is a hole in the first.
OUTLINES: dict[str, tuple[list[Point], ...]] = {
    "circle": (_wheel([1.0], 64),),
    "square": ([(-1, -1), (1, -1), (1, 1), (-1, 1)],),
    "triangle": (_wheel([1.0], 3),),
    "star": (_wheel([1.0, 0.4], 10),),
    "cross": (
        [
            *[(-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)],
            *[(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)],
        ],
    ),
    "ring": (_wheel([1.0], 64), _wheel([0.55], 64)),
}

PAIRS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in OUTLINES)
UNSEEN = tuple(
    f"{colour} {shape}"
    for column, colour in enumerate(COLOURS)
    for row, shape in enumerate(OUTLINES)
    if (column + row) % 4 == 0
)
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)


class Scenes:
    """A data set of scenes, drawn on access; equal seed and index give an equal scene.

    Boxes do not overlap, so each box bounds exactly the pixels of its shape.

    Args:
        count: Number of scenes, at least 1.
        pairs: Names that may appear, each "colour shape".
        seed: Seed of the data set, at least 0.
        image_size: Height and width of the images in pixels, at least 32.
        num_shapes: Fewest and most shapes in a scene; a crowded scene may get fewer, but never none.
        sizes: Smallest and largest longer side of a shape, relative to the image's side, in [0.05, 0.9]; sampled
            uniformly on a logarithmic scale.
        noise: Standard deviation of the pixel noise, on the scale 0..255.

    Raises:
        ValueError: A number is out of range, or a pair is not in PAIRS.
    """

    def __init__(
        self,
        count: int,
        pairs: Sequence[str] = PAIRS,
        *,
        seed: int = 0,
        image_size: int = 160,
        num_shapes: tuple[int, int] = (2, 7),
        sizes: tuple[float, float] = (0.1, 0.45),
        noise: float = 6.0,
    ) -> None:
        if count < 1 or seed < 0 or image_size < 32 or noise < 0:
            raise ValueError(
                f"count must be at least 1, seed and noise at least 0 and image_size at least 32, got {count}, {seed}, "
                f"{noise} and {image_size}."
            )
        if not 1 <= num_shapes[0] <= num_shapes[1]:
            raise ValueError(f"num_shapes must be (least, most) with 1 <= least <= most, got {num_shapes}.")
        if not 0.05 <= sizes[0] <= sizes[1] <= 0.9:
            raise ValueError(f"sizes must be (smallest, largest) with 0.05 <= smallest <= largest <= 0.9, got {sizes}.")
        unknown = [pair for pair in pairs if pair not in PAIRS]
        if unknown or not pairs:
            raise ValueError(
                f"pairs must be names such as {PAIRS[0]!r} from PAIRS, got {unknown[0] if unknown else pairs!r}."
            )
        self.count = count
        self.pairs = tuple(pairs)
        self.seed = seed
        self.image_size = image_size
        self.num_shapes = num_shapes
        self.sizes = sizes
        self.noise = noise

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw a scene.

        Args:
            index: Index of the scene; negative ones count from the end.

        Returns:
            A row with `image` (PIL, RGB), `image_id` (the index), `width`, `height`, `boxes` (N lists xyxy in pixels),
            `names` (N) and `crowd` (N times False).

        Raises:
            IndexError: The index is out of range.
        """
        place = range(self.count)[index]
        rng = np.random.default_rng((self.seed, place))
        pixels = _background(self.image_size, rng)
        boxes: list[list[float]] = []
        names = []
        for _ in range(int(rng.integers(self.num_shapes[0], self.num_shapes[1] + 1))):
            pair = self.pairs[int(rng.integers(len(self.pairs)))]
            colour, shape = pair.split()
            size = self.image_size * math.exp(rng.uniform(math.log(self.sizes[0]), math.log(self.sizes[1])))
            mask = _stencil(shape, size, rng.uniform(-20, 20))
            box = self._free_place(mask.shape, boxes, rng)
            if box is None:
                continue
            left, top, right, bottom = box
            pixels[top:bottom, left:right][mask] = _colour(colour, rng)
            boxes.append([float(side) for side in box])
            names.append(pair)
        if self.noise > 0:
            pixels += self.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
        image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        return {
            "image": image,
            "image_id": place,
            "width": self.image_size,
            "height": self.image_size,
            "boxes": boxes,
            "names": names,
            "crowd": [False] * len(names),
        }

    def _free_place(
        self, shape: tuple[int, ...], boxes: Sequence[Sequence[float]], rng: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        """Find a place for a shape of this height and width that overlaps no other box; None if a few attempts fail."""
        height, width = shape
        for _ in range(ATTEMPTS):
            left = int(rng.integers(self.image_size - width + 1))
            top = int(rng.integers(self.image_size - height + 1))
            right, bottom = left + width, top + height
            if all(right <= x1 or x2 <= left or bottom <= y1 or y2 <= top for x1, y1, x2, y2 in boxes):
                return left, top, right, bottom
        return None


def write_coco(scenes: Scenes, annotations: str | Path) -> None:
    """Write scenes as a COCO JSON file with `images/` beside it, for `read_coco`.

    Args:
        scenes: The scenes; their pairs become the categories, numbered from 1.
        annotations: The JSON file to write.
    """
    annotations = Path(annotations)
    images = annotations.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    numbers = {pair: number for number, pair in enumerate(scenes.pairs, start=1)}
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": pair} for pair, number in numbers.items()],
    }
    for row in scenes:
        file_name = f"{annotations.stem}-{row['image_id']:06}.png"
        row["image"].save(images / file_name)
        content["images"].append(
            {"id": row["image_id"], "file_name": file_name, "width": row["width"], "height": row["height"]}
        )
        for (x1, y1, x2, y2), name in zip(row["boxes"], row["names"], strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": row["image_id"],
                    "category_id": numbers[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    annotations.write_text(json.dumps(content), encoding="utf-8")


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float32 in 0..255: a linear gradient between two greyish tones."""
    ends = [
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, BACKGROUND_SATURATION), value)
        for value in rng.uniform(0.1, 0.95) + np.array([-0.08, 0.08])
    ]
    first, last = (255 * np.clip(np.array(end, dtype=np.float32), 0, 1) for end in ends)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    share = 0.5 + (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]) / math.sqrt(2)
    return (first + share[:, :, None] * (last - first)).astype(np.float32)


def _colour(name: str, rng: np.random.Generator) -> np.ndarray:
    """(3,) float32 in 0..255: a random shade of the colour."""
    hue, saturation, value = COLOURS[name]
    hue += rng.uniform(-HUE_JITTER, HUE_JITTER)
    value = min(1.0, value + rng.uniform(-VALUE_JITTER, VALUE_JITTER))
    return 255 * np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), dtype=np.float32)


def _stencil(shape: str, size: float, degrees: float) -> np.ndarray:
    """(height, width) bool: the rotated shape, cropped to its pixels, with a longer side of about `size` pixels."""
    turn = cmath.rect(1, math.radians(degrees))
    outlines = [turn * np.array([complex(x, y) for x, y in outline]) for outline in OUTLINES[shape]]
    left, top = float(outlines[0].real.min()), float(outlines[0].imag.min())
    scale = (size - 1) / max(float(outlines[0].real.max()) - left, float(outlines[0].imag.max()) - top)
    side = math.ceil(size) + 1
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for outline, ink in zip(outlines, (255, 0), strict=False):
        corners = scale * (outline - complex(left, top))
        draw.polygon([(float(corner.real), float(corner.imag)) for corner in corners], fill=ink)
    return np.asarray(canvas.crop(canvas.getbbox())) > 0
