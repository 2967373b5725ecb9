"""One engine over a model: pictures and labels in, detections out.

Reading order: engine (Detector), vocabulary (labels, aliases, templates), detections (the result), text_features
(text features that are computed once), loading (a model from a name).
"""
