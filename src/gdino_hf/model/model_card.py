"""The model card (README.md) written beside saved weights."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .configuration_gdino import GDinoConfig

# The sentence transformers writes into the card of a new repository, beside empty headings.
_PLACEHOLDER = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
# The section that is carried on to models trained from these weights; gdino-nano's card has it.
_PROVENANCE = "## Where the parts come from"
_TAGS = ("gdino", "grounding-dino", "open-vocabulary-detection")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_BODY = """# {name}

A Grounding DINO detector ([Liu et al. 2023](https://arxiv.org/abs/2303.05499)): it finds the objects that a list of
labels names in a photograph. The Python package `gdino-hf` loads the weights{or_without}.

```python
{usage}
```

| part | value |
|---|---|
| image backbone | {backbone} |
| text encoder | {text} |
| width | {config.d_model} |
| encoder / decoder layers | {config.encoder_layers} / {config.decoder_layers} |
| queries | {config.num_queries} |
| feature levels | {config.num_feature_levels} |
| class head | {config.class_head} |
| fusion | {config.fusion_type} |
{origin}
## Fill in before sharing

Training data and its licence, the licence of these weights and of the weights they started from, how they were
evaluated, and what they cannot do.
"""

_WITH_PACKAGE = (
    "from gdino_hf import GDinoForObjectDetection, GDinoProcessor",
    "from PIL import Image",
    "",
    'model = GDinoForObjectDetection.from_pretrained("{name}").eval()',
    'processor = GDinoProcessor.from_pretrained("{name}")',
)
_WITH_CUSTOM_CODE = (
    "from PIL import Image",
    "from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor",
    "",
    "# This runs the code beside the weights: read it first, or install gdino-hf and leave trust_remote_code out.",
    'model = AutoModelForZeroShotObjectDetection.from_pretrained("{name}", trust_remote_code=True).eval()',
    'processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)',
)
_DETECT = (
    'image = Image.open("photograph.jpg")',
    'inputs = processor(images=image, text=["cat", "remote control"])',
    "results = processor.post_process_grounded_object_detection(",
    "    model(**inputs), inputs, threshold=0.3, target_sizes=[(image.height, image.width)]",
    ")",
    'print(results[0]["text_labels"], results[0]["scores"], results[0]["boxes"])',
)


def write_model_card(
    folder: str | Path, config: GDinoConfig, name: str | None = None, replace_placeholder: bool = False
) -> bool:
    """Write README.md beside saved weights, unless there is one that somebody wrote.

    The licence and the origin of the weights that training started from are copied into the new card.

    Args:
        folder: Folder of the weights.
        config: The model's configuration.
        name: Hub id or folder from which readers load the weights (default: the folder's name).
        replace_placeholder: Also replace the card that transformers writes into new repositories; its tags and other
            metadata stay.

    Returns:
        Whether a card was written.
    """
    path, metadata = Path(folder) / "README.md", {}
    if path.exists():
        present = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if not (replace_placeholder and _is_placeholder(present)):
            return False
        metadata = present.data.to_dict()
    name = name or Path(folder).resolve().name or "model"
    origin, inherited = _origin(config, Path(folder))
    has_code = bool(getattr(config, "auto_map", None))
    usage = "\n".join((_WITH_CUSTOM_CODE if has_code else _WITH_PACKAGE) + _DETECT)
    body = _BODY.format(
        name=name,
        or_without=", and so does the code beside them without it" if has_code else "",
        usage=usage.replace("{name}", name),
        backbone=getattr(config.backbone_config, "model_type", "unknown"),
        text=getattr(config.text_config, "model_type", "unknown"),
        config=config,
        origin=origin,
    )
    merged = {"library_name": "transformers", "pipeline_tag": "zero-shot-object-detection", **inherited, **metadata}
    merged["tags"] = list(dict.fromkeys((*_TAGS, *(metadata.get("tags") or ()))))
    path.write_text(f"---\n{ModelCardData(**merged).to_yaml()}\n---\n{body}", encoding="utf-8")
    return True


def _is_placeholder(card: ModelCard) -> bool:
    """Return whether a card is transformers' unedited template; an edited one may still contain its sentence."""
    if _PLACEHOLDER not in card.text:
        return False
    # transformers repeats metadata in the text when it creates a card, but not when it adds metadata later.
    return any(
        card.text.split() == ModelCard.from_template(data, model_description=_PLACEHOLDER).text.split()
        for data in (card.data, ModelCardData())
    )


def _origin(config: GDinoConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    """Describe the weights that training started from, as a section of the card and as metadata."""
    source = str(config.name_or_path or "")
    if not source or Path(source).resolve() == folder.resolve():
        return "", {}
    readme = Path(source) / "README.md"
    if not readme.is_file():
        if Path(source).exists() or not _HUB_ID.fullmatch(source):
            return "", {}
        link = f"[{source}](https://huggingface.co/{source})"
        return f"\n## What it started from\n\nThe weights of {link}; its licence applies to these weights too.\n", {
            "base_model": source
        }
    card = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    known = card.data.to_dict()
    inherited = {key: known[key] for key in ("license", "license_name", "license_link", "base_model") if key in known}
    licence = f" (licence: {known['license']})" if "license" in known else ""
    section = f"\n## What it started from\n\nThe weights of {Path(source).name}{licence}.\n"
    _, heading, rest = card.text.partition(f"{_PROVENANCE}\n")
    if heading:
        # The section ends at the next heading of its own or a higher level.
        section += f"\n{_PROVENANCE}\n{re.split(r'^##? ', rest, maxsplit=1, flags=re.MULTILINE)[0].rstrip()}\n"
    return section, inherited
