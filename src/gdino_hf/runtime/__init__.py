"""Exported models without torch: `from gdino_hf.runtime import Detector`, with the calls and results of the package's.

Reading order: exported_detector (Detector), exported_search (one search over many pictures), prompt_tokens (the
tokenizer), array_selection (token scores to results). The folder, its graphs, pictures, labels, options and results are
read by the modules that the package itself uses, none of which imports torch.
"""

from ..detection.detections import Detections
from ..detection.exported_folder import ExportError
from ..detection.picture_stream import DetectionError
from ..detection.vocabulary import Vocabulary
from .exported_detector import Detector

__all__ = ["DetectionError", "Detections", "Detector", "ExportError", "Vocabulary"]
