"""Convert grounding-dino and mm-grounding-dino models of transformers to this package's layout, and back.

    python conversion/convert_transformers.py IDEA-Research/grounding-dino-tiny grounding-dino-tiny
    python conversion/convert_transformers.py grounding-dino-tiny theirs --to-transformers

src/gdino_hf/conversion/keys/transformers.txt says which of their tensors is which of ours. `gdino convert` takes the
same options and recognizes the layout automatically.
"""

import sys

from gdino_hf.conversion.command import main

if __name__ == "__main__":
    sys.exit(main("transformers", description=__doc__))
