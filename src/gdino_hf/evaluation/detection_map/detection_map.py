"""`evaluate.load(<this folder>)` looks for a file of the folder's name; the metric is the one in the file beside it."""

from gdino_hf.evaluation.detection_map import DetectionMap

__all__ = ["DetectionMap"]
