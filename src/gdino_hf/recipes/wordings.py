"""Other wordings of the names of everyday and wild photographs, and the thing that each wording means.

A model that is trained on "tv" alone need not find "a television". In training, a name is therefore sometimes replaced
by a synonym, by its plural, or by a phrase with an article or a template around it. Names that mean the same in the two
sets ("couch" in one, "sofa" in the other) share a meaning, so that neither serves as a negative of the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.text_prompt import name_key

# Words for the same thing, by the name that everyday photographs are annotated with.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "person": ("human", "pedestrian"),
    "bicycle": ("bike",),
    "car": ("automobile",),
    "motorcycle": ("motorbike",),
    "airplane": ("plane", "aircraft"),
    "truck": ("lorry",),
    "traffic light": ("traffic signal",),
    "fire hydrant": ("hydrant",),
    "cat": ("kitty",),
    "dog": ("puppy",),
    "handbag": ("purse",),
    "tie": ("necktie",),
    "frisbee": ("flying disc",),
    "cup": ("mug",),
    "donut": ("doughnut",),
    "couch": ("sofa",),
    "potted plant": ("houseplant",),
    "dining table": ("table",),
    "tv": ("television", "tv set"),
    "laptop": ("notebook computer",),
    "mouse": ("computer mouse",),
    "remote": ("remote control",),
    "cell phone": ("mobile phone", "smartphone"),
    "oven": ("stove",),
    "refrigerator": ("fridge",),
    "teddy bear": ("stuffed bear",),
    "hair drier": ("hair dryer",),
}
# Names without a plural of their own and without "a" before them.
_UNCOUNTED = (
    "broccoli sheep corn cabbage garlic lettuce rice soup stew tofu tempeh porridge jerky rendang cream ice shrimp "
    "fish squid beef chicken satay sushi vegetation waste"
)
UNCOUNTED = frozenset(_UNCOUNTED.split())
# Materials are not counted, but things named after them are ("wine glass").
MATERIALS = frozenset({"glass", "metal", "plastic"})
_ENDINGS_WITH_ES = ("s", "sh", "ch", "x")


def plural(name: str) -> str | None:
    """Return the plural of an English noun phrase, or None if it has none or is one already."""
    last = name.split()[-1]
    if (
        last in UNCOUNTED
        or name in MATERIALS
        or (last.endswith("s") and not last.endswith(("ss", "us")))
        or not last.islower()
    ):
        return None
    irregular = {"person": "people", "knife": "knives", "mouse": "mice", "leaf": "leaves"}.get(last)
    if irregular is not None:
        return name[: -len(last)] + irregular
    if last.endswith("y") and last[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if last.endswith((*_ENDINGS_WITH_ES, "tato", "mato")) else "s")


def article(word: str) -> str:
    """Return the indefinite article before a word."""
    return "an" if word[0].lower() in "aeiou" else "a"


def wordings(name: str) -> list[str]:
    """Return the phrases that may stand for a name in a prompt, the name itself first.

    Args:
        name: Name of a class.

    Returns:
        Distinct phrases: the name and its synonyms, each alone, in the plural, with an article and in templates.
    """
    found = [name]
    for word in (name, *SYNONYMS.get(name, ())):
        many = plural(word)
        found += [word, f"the {word}"]
        if many is not None:
            # What is not counted, or is a plural already, has no "a" either.
            found += [many, f"{article(word)} {word}", f"a photo of {article(word)} {word}"]
    return list(dict.fromkeys(found))


class Wordings:
    """The wordings of a vocabulary, without those that could mean two of its names.

    Args:
        names: All names that photographs are annotated with.
    """

    def __init__(self, names: Iterable[str]) -> None:
        vocabulary = list(dict.fromkeys(names))
        own = {name_key(name) for name in vocabulary}
        shared = {name_key(word): name for name, words in SYNONYMS.items() for word in words}
        # Name that stands for everything that means the same.
        self._concepts = {name_key(name): shared.get(name_key(name), name) for name in vocabulary}
        holders: dict[str, set[str]] = {}
        for name in vocabulary:
            for phrase in wordings(name):
                holders.setdefault(name_key(phrase), set()).add(self._concepts[name_key(name)])
        for phrase, concepts in holders.items():
            if phrase not in own and len(concepts) == 1:
                self._concepts[phrase] = next(iter(concepts))
        self._phrases = {
            name: [
                phrase
                for phrase in wordings(name)[1:]
                if self._concepts.get(name_key(phrase)) == self._concepts[name_key(name)]
            ]
            for name in vocabulary
        }

    def meaning(self, label: str) -> str:
        """Return the name that stands for everything that a label means; an unknown label stands for itself."""
        return self._concepts.get(name_key(label), label)

    def draw(self, name: str, rng: random.Random) -> str:
        """Draw another wording of a name; the name itself if it has none.

        Args:
            name: Name of the vocabulary.
            rng: Random generator.
        """
        phrases = self._phrases.get(name)
        return rng.choice(phrases) if phrases else name

    def indices(self, names: Sequence[str]) -> dict[str, int]:
        """Map every wording of some names to the name's index.

        Args:
            names: Names of the vocabulary, for example a closed-set detector's classes.

        Returns:
            Index by label, in the form of `name_key`.
        """
        index = {self.meaning(name): number for number, name in enumerate(names)}
        return {phrase: index[concept] for phrase, concept in self._concepts.items() if concept in index}


class Reworded:
    """Transform that replaces some names of an example by other wordings, absent names included.

    All boxes of one name get the same wording. A wording that the example already uses otherwise is not taken.

    Args:
        wordings: The vocabulary's wordings.
        probability: Probability of another wording for a name of the photograph, 0..1.
        absent_probability: Probability of another wording for a name that is known to be absent, 0..1.
    """

    def __init__(self, wordings: Wordings, probability: float = 0.3, absent_probability: float = 0.15) -> None:
        self.wordings = wordings
        self.probability = probability
        self.absent_probability = absent_probability

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example with other names in "names" and "neg_names"."""
        present = list(dict.fromkeys(example["names"]))
        taken = {name_key(name) for name in (*present, *(example.get("neg_names") or ()))}
        new = {name: self._draw(name, self.probability, taken, rng) for name in present}
        result = {**example, "names": [new[name] for name in example["names"]]}
        if example.get("neg_names") is not None:
            result["neg_names"] = [
                self._draw(name, self.absent_probability, taken, rng) for name in example["neg_names"]
            ]
        return result

    def _draw(self, name: str, probability: float, taken: set[str], rng: random.Random) -> str:
        if rng.random() >= probability:
            return name
        drawn = self.wordings.draw(name, rng)
        if name_key(drawn) in taken:
            return name
        taken.add(name_key(drawn))
        return drawn
