"""The web page of gdino-hf: pictures, batches, videos and comparisons, with limits that suit a public server."""
