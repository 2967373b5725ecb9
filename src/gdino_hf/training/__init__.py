"""Training: the recipe of gdino-nano."""
