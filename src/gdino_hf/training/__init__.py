"""Fine-tuning on your own boxes: `GDinoTrainer`, and `gdino train` built on it."""
