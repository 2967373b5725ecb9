"""The web page of gdino-hf: detect, batches, video and comparison, safe to put on the open internet."""
