"""One engine over a model: pictures and labels in, detections out.

Reading order: detector (Detector), vocabulary (labels, aliases, templates), label_files and vocabulary_text
(vocabularies from files and from what people type), search (labels and options checked once for many pictures),
prompt_passes (forward passes over all prompts), detections (the result), phrase_grounding (captions), tiles (large
pictures), text_features (text features that are computed once), prepared_images and stages (reading beside the model),
loading (a model from a name).

Formats of other tools: detection_formats (the methods of Detections), dataset_files (files of many pictures), and one
file for each kind of format: coco_exchange, yolo_exchange, xml_exchange, annotation_tools, table_exchange,
supervision_exchange, with exchange_values beneath them.
"""
