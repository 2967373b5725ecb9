"""One engine over a model: pictures in, detections out."""
