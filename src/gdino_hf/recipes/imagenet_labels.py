"""Names of ImageNet's 1,000 classes and of the kinds of things that they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .wordings import SYNONYMS

# Classes that are no things with an outline of their own.
_NO_THINGS = (
    "alp, altar, bakery, barbershop, bell cote, boathouse, bookshop, breakwater, bubble, butcher shop, castle, church, "
    "cinema, cliff, cliff dwelling, confectionery, coral reef, dam, dock, dome, fountain, geyser, greenhouse, grocery "
    "store, groom, home theater, lakeside, library, lumbermill, maze, megalith, menu, monastery, mosque, obelisk, "
    "palace, patio, pier, planetarium, prison, promontory, restaurant, sandbar, scoreboard, seashore, shoe shop, "
    "stage, steel arch bridge, stone wall, suspension bridge, thatch, tile roof, tobacco shop, toyshop, triumphal "
    "arch, valley, vault, viaduct, volcano, web site"
)
NO_THINGS = frozenset(_NO_THINGS.split(", "))
# First names that mean something else to most readers; only the longer names of these classes are used.
_AMBIGUOUS = (
    "admiral, barrow, bluetick, bow, boxer, brass, buckeye, cairn, Cardigan, cardigan, chest, chime, clog, "
    "clumber, cock, coil, cradle, cricket, drake, ear, file, fly, hip, hook, horizontal bar, jay, kelpie, kite, "
    "monarch, mortar, muzzle, nail, nipple, organ, packet, papillon, pick, plane, projectile, racer, ram, redbone, "
    "reel, rule, safe, screen, slot, sorrel, spindle, stole, switch, tick, torch, upright, wing, wreck"
)
AMBIGUOUS = frozenset(_AMBIGUOUS.split(", "))
# Kinds of things, by the indices of their classes; both ends of a range are included.
_KINDS = """
airplane: 404 895; antelope: 351-353; bag: 414 636 728 748; ball: 429 430 522 574 722 768 805 852 890; bear: 294-297;
beetle: 300-307; bicycle: 444 671; bird: 7-24 80-100 127-146; boat: 472 484 554 576 625 780 814 871 914; book: 917 921;
bottle: 440 720 737 898 907; bus: 654 779 874; butterfly: 321-326; camera: 732 759; car: 436 468 511 609 627 656 661 751
817; cat: 281-285; cell phone: 487; chair: 423 559 765; clock: 409 530 892; computer: 527 620 681; couch: 831; cow: 345;
crab: 118-121; dog: 151-268; elephant: 385 386; fence: 489 716 912; fish: 0 1 389-397; fox: 277-280; frog: 30-32;
guitar: 402 546; hat: 515 808; helmet: 518 560; horse: 339; keyboard: 508 878; lamp: 846; laptop: 620 681; lizard:
38-48; monkey: 370-382; mushroom: 947 992-997; piano: 579 881; pig: 341-343; rabbit: 330-332; shark: 2-4; sheep: 348
349; shoe: 630 770; snake: 52-68; spider: 72-77; telephone: 528 707; train: 466 547 565 705 820; truck: 555 569 675 717
864 867; turtle: 33-37; wolf: 269-271
"""


def _indices(ranges: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


KINDS = {kind.strip(): _indices(ranges) for kind, ranges in (entry.split(":") for entry in _KINDS.split(";"))}
NUM_CLASSES = 1000
# Names that are called otherwise here, and broader names of those that have no class among the broader name's.
OTHER_NAMES = {"sports ball": "ball"}
BROADER = {"cell phone": "telephone", "handbag": "bag", "shark": "fish", "suitcase": "bag"}
_ENTRY = re.compile(r"\b\d+:\s*(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")")


def imagenet_names(path: str | Path) -> list[tuple[str, ...]]:
    """Read the names of ImageNet's classes from `imagenet_classes.js`.

    Args:
        path: The file of the npm package `@tensorflow-models/mobilenet`.

    Returns:
        The names of each class: its first one ("cellular telephone"), and its others of several words ("mobile phone").
        Other single words are left out, because they may mean something else ("cell"), and so are scientific names. A
        class has no names if it is no thing ("seashore"), or if another class has the same first name.

    Raises:
        ValueError: The file does not list 1,000 classes.
    """
    entries = [single or double for single, double in _ENTRY.findall(Path(path).read_text(encoding="utf-8"))]
    if len(entries) != NUM_CLASSES:
        raise ValueError(f"{path} lists {len(entries)} classes, ImageNet has 1000; give the npm package's own file.")
    phrases = [[phrase.strip() for phrase in entry.replace("\\", "").split(",")] for entry in entries]
    holders = Counter(first for first, *_ in phrases)
    names = []
    for first, *others in phrases:
        own = [] if first in AMBIGUOUS else [first]
        own += [phrase for phrase in others if " " in phrase and phrase.islower()]
        usable = first not in NO_THINGS and holders[first] == 1
        names.append(tuple(dict.fromkeys(own)) if usable else ())
    return names


def classes_of(name: str, class_names: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Return the classes that a name stands for: those of its kind, or those that are called so; none if unknown.

    Args:
        name: The name; its synonyms count too.
        class_names: What `imagenet_names` returned.
    """
    name = OTHER_NAMES.get(name, name)
    if name in KINDS:
        return KINDS[name]
    phrases = {name, *SYNONYMS.get(name, ())}
    return tuple(label for label, names in enumerate(class_names) if phrases.intersection(names))
