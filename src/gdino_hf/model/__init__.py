"""The Grounding DINO model, one file per section of the paper (Liu et al. 2023, arXiv:2303.05499).

Reading order:

1. modeling_gdino: the whole model in a dozen steps, and the detector with its heads.
2. feature_extraction, backbone, text_backbone: features of images and prompts (section 3; phrases kept apart: 3.4).
3. encoder, fusion, attention: image and text features enhance each other (3.1).
4. ms_deform_attn: deformable attention, which reads images at a few sampled points (Deformable DETR).
5. query_selection, image_geometry: the image tokens most similar to the text become queries (3.2).
6. decoder, position_encoding: queries gather from image and text and refine their boxes (3.3).
7. heads: boxes, and the similarity of queries and text tokens.
8. targets, denoising, matcher, losses: training (3.5).

Around the paper: configuration_gdino names every variant; text_prompt, caption_prompt, image_processing_gdino,
processing_gdino and pipeline_gdino turn labels and photographs into tensors and back, with coco_labels,
grounded_results and the files of their options; prompt_groups runs long lists of labels; pretrained_gdino, stored_model
and model_card load and save; csp_pan is the small backbone of gdino-nano; the msda files compute deformable attention;
transformers_internals holds every use of transformers' private parts.

The folder is flat and imports nothing else of gdino_hf, because it also travels to the Hub as custom code.
"""
