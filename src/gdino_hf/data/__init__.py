"""Data sets as rows of an image, its boxes and their names; augmentation, negative labels and the data collator."""
