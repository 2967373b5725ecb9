"""Zero-shot detection with the pipeline, and the same by hand, as the task guide of transformers shows it.

Arguments: checkpoint, picture, file for the results.
"""

import json
import sys

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, pipeline

checkpoint, picture, results_file = sys.argv[1:4]
image = Image.open(picture)

detector = pipeline(model=checkpoint, task="zero-shot-object-detection")
predictions = detector(image, candidate_labels=["a cat", "a remote control"], threshold=0.5)
draw = ImageDraw.Draw(image.copy())
for prediction in predictions:
    xmin, ymin, xmax, ymax = prediction["box"].values()
    draw.rectangle((xmin, ymin, xmax, ymax), outline="red", width=1)
    draw.text((xmin, ymin), f"{prediction['label']}: {round(prediction['score'], 2)}", fill="white")

model = AutoModelForZeroShotObjectDetection.from_pretrained(checkpoint)
processor = AutoProcessor.from_pretrained(checkpoint)
text_labels = [["a cat", "a remote control"]]
inputs = processor(images=image, text=text_labels, return_tensors="pt").to(model.device)
with torch.inference_mode():
    outputs = model(**inputs)
result = processor.post_process_grounded_object_detection(
    outputs, threshold=0.5, target_sizes=[(image.height, image.width)], text_labels=text_labels
)[0]
by_hand = [
    {"label": label, "score": round(score.item(), 6), "box": box.tolist()}
    for box, score, label in zip(result["boxes"], result["scores"], result["text_labels"], strict=True)
]
with open(results_file, "w", encoding="utf-8") as file:
    json.dump({"pipeline": predictions, "by hand": by_hand}, file)
