"""What makes the model fast on a CPU. model/ knows nothing of it; `optimize_for_inference` is installed from here."""
