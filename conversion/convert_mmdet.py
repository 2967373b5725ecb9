"""Convert MM-Grounding-DINO and LLMDet .pth files to this package's layout, and back.

    python conversion/convert_mmdet.py grounding_dino_swin-t_pretrain_obj365_goldg.pth mm-tiny --preset mm-tiny
    python conversion/convert_mmdet.py mm-tiny swint.pth --to-mmdet

src/gdino_hf/conversion/keys/mmdet.txt says which of their tensors is which of ours. `gdino convert` takes the same
options and recognizes the layout automatically.
"""

import sys

from gdino_hf.conversion.command import main

if __name__ == "__main__":
    sys.exit(main("mmdet", description=__doc__))
