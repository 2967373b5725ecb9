"""Boxes from a zero-shot detector, masks from a SAM model, as scripts in the manner of Grounded-SAM combine them.

Arguments: checkpoint, picture, file for the results, folder of a SAM model.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForMaskGeneration, AutoProcessor, GroundingDinoForObjectDetection, pipeline

detector_id, picture, results_file, segmenter_id = sys.argv[1:5]
image = Image.open(picture).convert("RGB")
labels = [label if label.endswith(".") else label + "." for label in ("a cat", "a remote control")]
detector = pipeline(model=detector_id, task="zero-shot-object-detection")
detections = detector(image, candidate_labels=labels, threshold=0.5)

segmenter = AutoModelForMaskGeneration.from_pretrained(segmenter_id)
segmenter_processor = AutoProcessor.from_pretrained(segmenter_id)


def masks_of(boxes):
    inputs = segmenter_processor(images=image, input_boxes=[boxes], return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter(**inputs)
    masks = segmenter_processor.post_process_masks(
        masks=outputs.pred_masks,
        original_sizes=inputs.original_sizes,
        reshaped_input_sizes=inputs.reshaped_input_sizes,
    )
    return masks[0]


boxes = [list(map(float, detection["box"].values())) for detection in detections]

# The other way that such scripts take: the model's own class, and the processor's boxes.
model = GroundingDinoForObjectDetection.from_pretrained(detector_id)
processor = AutoProcessor.from_pretrained(detector_id)
inputs = processor(images=image, text=" ".join(labels), return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
result = processor.post_process_grounded_object_detection(
    outputs, inputs["input_ids"], threshold=0.4, text_threshold=0.3, target_sizes=[image.size[::-1]]
)[0]
class_names = result["labels"]
input_boxes = result["boxes"].cpu().numpy().tolist()
masks = masks_of(input_boxes)
with open(results_file, "w", encoding="utf-8") as file:
    json.dump(
        {
            "detections": detections,
            "mask sizes": [list(masks_of(boxes).shape), list(masks.shape)],
            "found": [
                {"label": label, "score": score, "box": box}
                for label, score, box in zip(class_names, result["scores"].tolist(), input_boxes, strict=True)
            ],
        },
        file,
    )
