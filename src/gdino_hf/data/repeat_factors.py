"""Repeat-factor sampling: images with rare names are drawn more often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def repeat_factors(names: Sequence[Sequence[str]], threshold: float) -> list[float]:
    """Compute how often to draw each image (repeat-factor sampling, Gupta et al. 2019, arXiv:1908.03195).

    A name that occurs in a fraction f of the images has the factor max(1, sqrt(threshold / f)). An image has the
    largest factor of its names.

    Args:
        names: Names of each image's boxes.
        threshold: Fraction of images below which a name counts as rare, 0..1; 0 leaves every weight at 1.

    Returns:
        One weight per image, at least 1.
    """
    counts = Counter(name for image in names for name in set(image))
    factors = {name: max(1.0, math.sqrt(threshold * len(names) / count)) for name, count in counts.items()}
    return [max((factors[name] for name in image), default=1.0) for image in names]
