"""Objects followed through videos: frames in, detections with track ids out, and files of both.

Reading order: frame_sources (anything that has frames), decoding (video files), live_streams (cameras and addresses),
tracking (labels kept apart, ids kept stable), mask_tracking and object_memory (objects followed by a SAM 2 video
model), tracker_state (trackers saved and resumed), tracked_frames (a detector over a source), track_files (what a run
leaves), video_writing (annotated videos with their sound), counting (lines and zones), track_drawing.
"""
