"""A model as a folder that runs without Python code of its own: ONNX, OpenVINO, ExecuTorch or torch.export.

`export` writes the folder, `gdino_hf.runtime` and `gdino_hf.Detector` run it. graphs.py has what is traced,
graph_formats.py the way from a traced graph to a file, folder_document.py the description beside the file.
"""

from .exporting import FORMATS as FORMATS
from .exporting import VARIANTS as VARIANTS
from .exporting import export as export
