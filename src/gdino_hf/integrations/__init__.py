"""Where people already are: scripts and tools written for transformers' Grounding DINO run on the models of gdino_hf.

Reading order: stand_ins (our classes under transformers' names and conventions), replacement (`drop_in`, which makes
transformers load them).
"""
