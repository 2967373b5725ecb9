"""Recipes: programs that made gdino-nano and its parts, and an experiment on generated scenes.

Run one with `python -m gdino_hf.recipes.NAME`: `nano` trains gdino-nano, `nanodet_backbone` and `minilm_text_encoder`
convert its two pretrained parts, and `scenes` shows that words, not class numbers, drive detection.
"""
