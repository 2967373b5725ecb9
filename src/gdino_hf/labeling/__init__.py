"""Bulk labelling: any number of pictures to boxes, in shards that are written whole and never twice.

Reading order: label_run (label_pictures), sources (what there is to label), source_items (one picture of it),
data_set_sources (data sets as sources), picture_archives (pictures inside tar and Parquet files), shard_plan (the list
of pictures, cut into shards), shard_labels (a shard's pictures to rows), shard_files (rows as Parquet), label_computing
(products and threads), label_workers (processes that make shards), label_order (what they are told), ray_workers
(machines of a Ray cluster that make shards), ray_pipeline (a step of a Ray Data pipeline), death_journal (what its
actors died of), label_store (files of a run), label_settings (what a run was made with), label_results (the files of
all shards together), label_progress (what the user sees meanwhile), ranks (processes of a launcher that share a run),
remote_results (results at an address), hub_set (a data set for the Hub), contact_sheet (pictures to look at),
split_folders (folders for other trainers).

Evaluation over large sets runs on the same processes and machines: evaluation_order (what they are told),
evaluation_run (predictions in shards), rank_group (processes that wait for each other).
"""

from .ray_pipeline import ray_data

__all__ = ["ray_data"]
