"""The model's rooms. This folder is flat because it also travels to the Hub as custom code, file by file."""
