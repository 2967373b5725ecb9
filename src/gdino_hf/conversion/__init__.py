"""Checkpoints of other projects into this one's layout, and back."""
