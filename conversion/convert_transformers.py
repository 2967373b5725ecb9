"""Convert grounding-dino and mm-grounding-dino models of transformers to this package's layout, and back.

    python conversion/convert_transformers.py IDEA-Research/grounding-dino-tiny grounding-dino-tiny
    python conversion/convert_transformers.py grounding-dino-tiny theirs --to-transformers

Which of their tensors is which of ours, and by what rule, stands in src/gdino_hf/conversion/keys/transformers.txt;
`gdino convert` takes the same options and finds the layout by looking.
"""

import sys

from gdino_hf.conversion.command import main

if __name__ == "__main__":
    sys.exit(main("transformers", description=__doc__))
