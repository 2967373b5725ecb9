"""The README.md that goes with saved weights."""

from pathlib import Path

from .configuration_gdino import GDinoConfig

# In the generic card that pushing to the Hub would leave in a new repository.
_GENERIC = "automatically generated"

_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
tags:
- gdino
- grounding-dino
- open-vocabulary-detection
---
# {name}

A Grounding DINO detector ([Liu et al. 2023](https://arxiv.org/abs/2303.05499)): it finds in a photograph what a list of
labels names. The weights are read by the Python package `gdino-hf`.

```python
{usage}
```

| part | what |
|---|---|
| image backbone | {backbone} |
| text encoder | {text} |
| width | {config.d_model} |
| encoder / decoder layers | {config.encoder_layers} / {config.decoder_layers} |
| queries | {config.num_queries} |
| feature levels | {config.num_feature_levels} |
| class head | {config.class_head} |
| fusion | {config.fusion_type} |

## Fill in before sharing

Training data and its licence, the licence of these weights and of what they started from, how they were evaluated, and
what they cannot do.
"""

_USAGE = (
    "from gdino_hf import GDinoForObjectDetection, GDinoProcessor",
    "from PIL import Image",
    "",
    'model = GDinoForObjectDetection.from_pretrained("{name}").eval()',
    'processor = GDinoProcessor.from_pretrained("{name}")',
    'image = Image.open("photograph.jpg")',
    'inputs = processor(images=image, text=["cat", "remote control"])',
    "results = processor.post_process_grounded_object_detection(",
    "    model(**inputs), inputs, threshold=0.3, target_sizes=[(image.height, image.width)]",
    ")",
)


def write_model_card(folder: str | Path, config: GDinoConfig, replace_generic: bool = False) -> bool:
    """Write README.md beside saved weights, unless someone wrote one already.

    Args:
        folder: Where the weights are.
        config: The model's configuration.
        replace_generic: Replace the placeholder that transformers makes for new repositories.

    Returns:
        Whether a card was written.
    """
    path = Path(folder) / "README.md"
    if path.exists() and not (replace_generic and _GENERIC in path.read_text(encoding="utf-8")):
        return False
    name = Path(config._name_or_path or folder).name or "model"
    card = _CARD.format(
        name=name,
        usage="\n".join(_USAGE).replace("{name}", name),
        backbone=getattr(config.backbone_config, "model_type", "unknown"),
        text=getattr(config.text_config, "model_type", "unknown"),
        config=config,
    )
    path.write_text(card, encoding="utf-8")
    return True
