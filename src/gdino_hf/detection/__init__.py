"""One engine over a model: pictures and labels in, detections out.

Reading order: detector_engine (Detector), vocabulary (labels, aliases, templates), prompt_passes (forward passes over
all prompts), detections (the result), phrase_grounding (captions), tiles (large pictures), text_features (text features
that are computed once), stages (reading beside the model), loading (a model from a name).
"""
