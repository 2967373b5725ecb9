"""Data sets as rows of image, boxes and names; transforms, negative labels and the collator."""
