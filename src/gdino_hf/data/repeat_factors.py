"""How often each image is drawn, so that rare names are learned too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def repeat_factors(names: Sequence[Sequence[str]], threshold: float) -> list[float]:
    """Image weights that repeat rare names (repeat-factor sampling, Gupta et al. 2019, arXiv:1908.03195).

    A name on a share f of the images has the factor max(1, sqrt(threshold / f)); an image has the largest factor of
    its names.

    Args:
        names: Names of each image's boxes.
        threshold: Share of images below which a name counts as rare, 0..1; 0 leaves every weight at 1.

    Returns:
        One weight of at least 1 per image.
    """
    counts = Counter(name for image in names for name in set(image))
    factors = {name: max(1.0, math.sqrt(threshold * len(names) / count)) for name, count in counts.items()}
    return [max((factors[name] for name in image), default=1.0) for image in names]
