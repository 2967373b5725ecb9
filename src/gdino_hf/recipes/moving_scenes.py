"""Generated videos with exact truth: cut-outs and coloured shapes that move over photographs, to measure tracking.

Equal seeds give equal videos. Objects of one label cross each other, pass behind bars, leave the picture and are
replaced by new ones, grow and shrink, and the camera pans.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .scene_images import COLOURS, OUTLINES

KINDS = ("crossings", "occlusions", "exits", "pans", "scales")
"""What makes a video hard."""

SMALLEST_VISIBLE = 0.3
"""Part of an object's pixels that must be seen for it to be in the truth of a frame."""

FRAMES_AWAY = 25
"""What comes back after more frames outside the picture is a new object in the truth, as MOT Challenge has it."""

_BAR_COLOUR = (90, 80, 70)
_SPRITE = 128


@dataclass(frozen=True)
class MovingObject:
    """One object of a frame.

    Attributes:
        identity: Number of the object in its video, from 1.
        label: What it is.
        box: Its box as xyxy in pixels, within the picture, with the parts that others hide.
        visible: Part of its pixels that is seen, 0..1.
    """

    identity: int
    label: str
    box: tuple[float, float, float, float]
    visible: float


@dataclass
class _Actor:
    """An object on its path: its center starts at `start` and moves by `speed` pixels in a frame."""

    identity: int
    label: str
    sprite: Image.Image
    side: float
    start: np.ndarray
    speed: np.ndarray
    first: int
    phase: float
    bounces: bool


class MovingScenes:
    """One video: its frames and what is in them.

    Args:
        backgrounds: Photographs to move over.
        cutouts: Pictures of objects with their labels, beside the coloured shapes; none by default.
        kind: One of `KINDS`.
        seed: Seed of the video, at least 0.
        frames: Number of frames, at least 1.
        size: (width, height) in pixels, each at least 64.
        objects: Number of objects at a time, at least 1.
        labels: How many different labels they have; few make tracking hard.
        scale: Side of an object in heights of the picture, within 0.05..0.5.

    Raises:
        ValueError: There is no such kind, or a number is out of its range.
    """

    def __init__(
        self,
        backgrounds: Sequence[Image.Image],
        cutouts: Sequence[tuple[str, Image.Image]] = (),
        *,
        kind: str = "crossings",
        seed: int = 0,
        frames: int = 100,
        size: tuple[int, int] = (320, 240),
        objects: int = 6,
        labels: int = 2,
        scale: float = 0.2,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"There is no kind {kind!r}; choose {', '.join(KINDS)}.")
        if not backgrounds or frames < 1 or min(size) < 64 or objects < 1 or labels < 1 or seed < 0:
            raise ValueError(
                "A video needs a photograph, a frame, 64 pixels a side, an object, a label and a seed from 0 on, got "
                f"{len(backgrounds)}, {frames}, {size}, {objects}, {labels} and {seed}."
            )
        if not 0.05 <= scale <= 0.5:
            raise ValueError(f"scale is {scale}; give a part of the picture's height within 0.05..0.5.")
        self.kind, self.frames, self.size, self._scale = kind, frames, size, scale
        self._rng = np.random.default_rng((seed, KINDS.index(kind)))
        margin = 2 if kind == "pans" else 1
        wide = (size[0] * margin, size[1])
        background = backgrounds[int(self._rng.integers(len(backgrounds)))].convert("RGB")
        self._background = background.resize(wide, Image.Resampling.BILINEAR)
        names = [f"{colour} {shape}" for colour in COLOURS for shape in OUTLINES]
        chosen = self._rng.choice(len(names), size=labels, replace=False)
        sprites = [(label, picture.convert("RGBA")) for label, picture in cutouts]
        self._sprites = (sprites + [(names[index], _shape(names[index])) for index in chosen])[:labels]
        self.labels = tuple(dict.fromkeys(label for label, _ in self._sprites))
        self._actors = self._cast(objects)
        self._identities = self._identify()

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[tuple[Image.Image, list[MovingObject]]]:
        return (self[number] for number in range(self.frames))

    def __getitem__(self, number: int) -> tuple[Image.Image, list[MovingObject]]:
        """Draw a frame.

        Args:
            number: Index of the frame; negative ones count from the end.

        Returns:
            The RGB picture and its objects, those seen by less than `SMALLEST_VISIBLE` left out.

        Raises:
            IndexError: There is no such frame.
        """
        number = range(self.frames)[number]
        width, height = self.size
        pan = self._pan(number)
        picture = self._background.crop((pan, 0, pan + width, height))
        owners = Image.new("I", self.size)
        drawn = []
        for actor in self._actors:
            if number < actor.first:
                continue
            left, top, right, bottom = self._box(actor, number)
            sprite = actor.sprite.resize((right - left, bottom - top))
            mask = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
            picture.paste(sprite.convert("RGB"), (left, top), mask)
            owners.paste(actor.identity, (left, top), mask)
            total = int(np.count_nonzero(np.asarray(mask)))
            drawn.append((actor, (left, top, right, bottom), total))
        for left, right in self._bars():
            ImageDraw.Draw(picture).rectangle((left, 0, right, height), fill=_BAR_COLOUR)
            owners.paste(0, (left, 0, right + 1, height))
        seen = np.asarray(owners)
        found = []
        for actor, (left, top, right, bottom), total in drawn:
            visible = np.count_nonzero(seen == actor.identity) / total
            if visible >= SMALLEST_VISIBLE:
                box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
                identity = self._identities[actor.identity, number]
                found.append(MovingObject(identity, actor.label, box, visible))
        return picture, found

    def _pan(self, number: int) -> int:
        """Return how far the camera has turned to the right, in pixels."""
        turned = 1 - math.cos(2 * math.pi * number / 150) if self.kind == "pans" else 0.0
        return round(self.size[0] / 2 * turned)

    def _box(self, actor: _Actor, number: int) -> tuple[int, int, int, int]:
        """Return the box of an object in a frame, which may be outside the picture."""
        side = actor.side * (1 + 0.5 * math.sin(0.08 * number + actor.phase) * (self.kind == "scales"))
        width, height = _length(actor.sprite.width, side), _length(actor.sprite.height, side)
        x, y = self._center(actor, number)
        left, top = round(x - width / 2 - self._pan(number)), round(y - height / 2)
        return left, top, left + width, top + height

    def _identify(self) -> dict[tuple[int, int], int]:
        """Return the identity of each actor in each frame: a new one for each time it is in the picture."""
        found, identity = {}, 0
        for actor in self._actors:
            identity, away = identity + 1, 0
            for number in range(self.frames):
                left, top, right, bottom = self._box(actor, number)
                is_inside = left < self.size[0] and right > 0 and top < self.size[1] and bottom > 0
                if is_inside and away > FRAMES_AWAY and number > away:
                    identity += 1
                away = 0 if is_inside else away + 1
                found[actor.identity, number] = identity
        return found

    def _bars(self) -> list[tuple[int, int]]:
        """Return the first and the last column of each bar in front of the objects."""
        if self.kind != "occlusions":
            return []
        width = self.size[0]
        return [(round(share * width), round((share + 0.12) * width)) for share in (0.25, 0.65)]

    def _center(self, actor: _Actor, number: int) -> tuple[float, float]:
        place = actor.start + actor.speed * (number - actor.first)
        if not actor.bounces:
            return float(place[0]), float(place[1])
        # A path that is reflected at the edges.
        room = np.array(self._background.size) - actor.side
        folded = np.abs((place - actor.side / 2) % (2 * room))
        x, y = np.where(folded > room, 2 * room - folded, folded) + actor.side / 2
        return float(x), float(y)

    def _cast(self, objects: int) -> list[_Actor]:
        """Choose all objects of the video with their paths."""
        rng, (width, height) = self._rng, self._background.size
        actors: list[_Actor] = []
        side = self.size[1] * self._scale
        for place in range(objects):
            lane = (place + 0.5) / objects * (height - side) + side / 2
            if self.kind == "exits":
                # Objects of one lane follow each other through the picture, from one side to the other.
                direction = 1 if place % 2 else -1
                speed = direction * rng.uniform(2.5, 4.5)
                length = math.ceil((width + 2 * side) / abs(speed))
                for first in range(-int(rng.integers(length)), self.frames, length + 12):
                    start = np.array([-side if direction > 0 else width + side, lane])
                    begin = start + np.array([speed, 0.0]) * max(-first, 0)
                    actors.append(
                        self._actor(len(actors), side, begin, np.array([speed, 0.0]), max(first, 0), bounces=False)
                    )
                continue
            angle = rng.uniform(-0.5, 0.5) + math.pi * (place % 2)
            velocity = rng.uniform(2.0, 4.0) * np.array([math.cos(angle), math.sin(angle)])
            start = np.array([rng.uniform(side, width - side), lane])
            actors.append(self._actor(len(actors), side * rng.uniform(0.8, 1.2), start, velocity, 0, bounces=True))
        return actors

    def _actor(
        self, place: int, side: float, start: np.ndarray, speed: np.ndarray, first: int, bounces: bool
    ) -> _Actor:
        label, sprite = self._sprites[place % len(self._sprites)]
        return _Actor(place + 1, label, sprite, side, start, speed, first, float(self._rng.uniform(0, 6)), bounces)


def _length(side: int, longest: float) -> int:
    return max(round(side * longest / _SPRITE), 2)


def cutout(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Cut an object out of a photograph, in the size of the coloured shapes.

    Args:
        picture: The photograph.
        box: The object's box as xyxy in pixels.
    """
    left, top, right, bottom = (round(side) for side in box)
    crop = picture.convert("RGB").crop((left, top, right, bottom))
    crop.thumbnail((_SPRITE, _SPRITE))
    scale = _SPRITE / max(crop.size)
    return crop.resize((round(crop.width * scale), round(crop.height * scale))).convert("RGBA")


def _shape(name: str) -> Image.Image:
    colour, shape = name.split()
    hue, saturation, value = COLOURS[colour]
    red, green, blue = (round(255 * each) for each in colorsys.hsv_to_rgb(hue / 360, saturation, value))
    sprite = Image.new("RGBA", (_SPRITE, _SPRITE))
    draw = ImageDraw.Draw(sprite)
    for outline, ink in zip(OUTLINES[shape], ((red, green, blue, 255), (0, 0, 0, 0)), strict=False):
        draw.polygon([((x + 1) / 2 * (_SPRITE - 1), (y + 1) / 2 * (_SPRITE - 1)) for x, y in outline], fill=ink)
    return sprite.crop(sprite.getbbox())
