"""Boxes to masks, with the promptable segmenters of transformers: SAM, SAM-HQ, SAM 2 and 2.1, SAM 3's tracker, EdgeTAM.

Reading order: segmenter (Segmenter), segmenter_inputs (what a segmenter sees of a picture and its boxes),
segmenter_loading (a segmenter from a name). Masks in files of other tools are in detection: mask_outlines,
mask_pictures, and the files of the formats.
"""

from .segmenter import Segmenter

__all__ = ["Segmenter"]
