"""Evaluation: predictions over a data set, their metrics, and reports."""

MAX_DETECTIONS = 100
"""Detections counted per image in COCO's metrics."""
LVIS_PER_PROMPT, LVIS_LABELS = 300, 80
"""Detections kept of every prompt, and labels in a prompt, for LVIS' fixed AP."""
