"""Convert Grounding DINO and Open-GroundingDino .pth files to this package's layout, and back.

    python conversion/convert_original.py groundingdino_swint_ogc.pth grounding-dino-tiny --preset tiny
    python conversion/convert_original.py grounding-dino-tiny swint.pth --to-original

src/gdino_hf/conversion/keys/original.txt says which of their tensors is which of ours. `gdino convert` takes the same
options and recognizes the layout automatically.
"""

import sys

from gdino_hf.conversion.command import main

if __name__ == "__main__":
    sys.exit(main("original", description=__doc__))
