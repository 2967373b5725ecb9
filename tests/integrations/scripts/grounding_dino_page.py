"""Detection with a text of two labels, as the Grounding DINO page of transformers shows it, on two pictures at once.

Arguments: checkpoint, picture, file for the results.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

model_id, picture, results_file = sys.argv[1:4]
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(model_id)
model = AutoModelForZeroShotObjectDetection.from_pretrained(model_id).to(device)

image = Image.open(picture)
text = "a cat. a remote control."
inputs = processor(images=image, text=text, return_tensors="pt").to(device)
with torch.no_grad():
    outputs = model(**inputs)
results = processor.post_process_grounded_object_detection(
    outputs, inputs.input_ids, threshold=0.4, text_threshold=0.3, target_sizes=[image.size[::-1]]
)
found = []
for box, score, label in zip(results[0]["boxes"], results[0]["scores"], results[0]["labels"], strict=True):
    found.append({"label": label, "score": round(score.item(), 6), "box": [round(side, 5) for side in box.tolist()]})

# What training and exporting scripts touch.
words = processor.batch_decode(inputs.input_ids, skip_special_tokens=True)
tokens = processor.tokenizer(text, return_tensors="pt").input_ids
assert tokens.tolist() == inputs.input_ids.tolist()

batch = processor(images=[image, image], text=[text, text], return_tensors="pt", padding=True).to(device)
with torch.no_grad():
    outputs = model(**batch)
both = processor.post_process_grounded_object_detection(
    outputs, batch["input_ids"], threshold=0.4, text_threshold=0.3, target_sizes=torch.tensor([image.size[::-1]] * 2)
)
with open(results_file, "w", encoding="utf-8") as file:
    json.dump({"found": found, "words": words, "batch": [result["boxes"].tolist() for result in both]}, file)
