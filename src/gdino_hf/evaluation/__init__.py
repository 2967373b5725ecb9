"""Evaluation: predictions over a data set, their metrics, and reports."""
