"""What lies beside converted weights: tokenizer, image processor and model card."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.model.processing_gdino import GDinoProcessor

from .conversion_error import ConversionError

PUBLISHED_TOKENIZER = "google-bert/bert-base-uncased"
"""Hub id of the tokenizer that every published checkpoint was trained with."""

_PROBE_SECONDS = 5
_DELIMITERS = ["[CLS]", "[SEP]", ".", "?"]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")

_CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: zero-shot-object-detection
tags:
- {model_type}
- grounding-dino
- open-vocabulary-detection
---
# {name}

A Grounding DINO detector ([Liu et al. 2023](https://arxiv.org/abs/2303.05499)): it finds in a photograph what a list of
labels names.

## Source and conversion

These weights are not new: they were converted, tensor by tensor and without arithmetic, from

| | |
|---|---|
| source | `{source}` |
| layout | {title}, [{url}]({url}) |
{hashes}

by the Python package `gdino-hf` (`gdino convert`). What became of every tensor is in `conversion.json`{kept}.

## Licence

{licence}: the licence of the weights published in this layout. Weights that someone else trained may come under
another; then the line at the top of this card is theirs to change.

## Use

```python
{usage}
```

| part | what |
|---|---|
| image backbone | {backbone} |
| text encoder | {text} |
| width, encoder / decoder layers | {config.d_model}, {config.encoder_layers} / {config.decoder_layers} |
| queries, feature levels | {config.num_queries}, {config.num_feature_levels} |
| class head | {config.class_head} |
"""

_USAGE = {
    "gdino": (
        "from gdino_hf import GDinoForObjectDetection, GDinoProcessor",
        "",
        'model = GDinoForObjectDetection.from_pretrained("{name}").eval()',
        'processor = GDinoProcessor.from_pretrained("{name}")',
    ),
    "transformers": (
        "from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor",
        "",
        'model = AutoModelForZeroShotObjectDetection.from_pretrained("{name}").eval()',
        'processor = AutoProcessor.from_pretrained("{name}")',
    ),
}


def reachable(repository: str) -> bool:
    """Whether the Hub answers for a repository: asking it for files would take minutes to give up."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/api/models/{repository}", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
    return True


def load_tokenizer(wanted: str) -> Any:
    """A tokenizer from a folder, a vocab.txt or the Hub.

    Args:
        wanted: Path or Hub id.

    Returns:
        The tokenizer.

    Raises:
        ConversionError: It cannot be had.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    path = Path(wanted).expanduser()
    try:
        if path.is_file():
            return BertTokenizerFast(vocab=str(path), model_max_length=512)
        if path.is_dir() and not (path / "tokenizer_config.json").is_file():
            return BertTokenizerFast.from_pretrained(path, local_files_only=True)
        local = path.is_dir() or not reachable(wanted)
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else wanted, local_files_only=local)
    # Loaders raise whatever a damaged or unreachable tokenizer leads them to.
    except Exception as error:
        raise ConversionError(
            f"The tokenizer {wanted} cannot be had here; give --tokenizer a folder or vocab.txt of BERT's uncased "
            "vocabulary, or go online."
        ) from error


def fitting_tokenizer(wanted: str, config: GDinoConfig) -> Any:
    """The tokenizer, once it is certain that the text encoder has an embedding for each of its ids.

    Raises:
        ConversionError: It cannot be had or has too many entries.
    """
    tokenizer = load_tokenizer(wanted)
    size = getattr(config.text_config, "vocab_size", len(tokenizer))
    if len(tokenizer) > size:
        raise ConversionError(
            f"The tokenizer {wanted} has {len(tokenizer)} entries, but the text encoder embeds {size}; give "
            "--tokenizer the one the checkpoint was trained with."
        )
    return tokenizer


def delimiter_ids(tokenizer: Any) -> list[int] | None:
    """Ids of the tokens that part phrases; None if the vocabulary lacks one."""
    ids = tokenizer.convert_tokens_to_ids(_DELIMITERS)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if any(id is None or id == unknown for id in ids) else [int(id) for id in ids]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings its own tokenizer."""
    return folder.is_dir() and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def image_processor_of(folder: Path) -> GDinoImageProcessor:
    """The folder's image processor, with the published settings if it has none."""
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return GDinoImageProcessor.from_pretrained(folder)
    return GDinoImageProcessor()


def save_processor(
    folder: Path, tokenizer: Any, image_processor: GDinoImageProcessor, for_transformers: bool, max_text_len: int
) -> None:
    """Write tokenizer and image processor.

    Args:
        folder: Where to.
        tokenizer: None writes the image processor alone.
        image_processor: Ours.
        for_transformers: Write them as transformers' own processor.
        max_text_len: Most tokens of a prompt.
    """
    if not for_transformers:
        if tokenizer is None:
            image_processor.save_pretrained(folder)
        else:
            GDinoProcessor(image_processor, tokenizer, max_text_len=max_text_len).save_pretrained(folder)
        return
    from transformers import GroundingDinoProcessor
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    settings = {name: value for name, value in image_processor.to_dict().items() if name != "image_processor_type"}
    theirs = GroundingDinoImageProcessorPil(**settings)
    if tokenizer is None:
        theirs.save_pretrained(folder)
    else:
        GroundingDinoProcessor(theirs, tokenizer).save_pretrained(folder)


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's own model card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"\A---\n(?:.*\n)*?license:[ ]*(\S+)\n(?:.*\n)*?---\n", card.read_text(encoding="utf-8"))
    return found[1] if found else None


def write_card(
    folder: Path,
    *,
    name: str,
    config: GDinoConfig,
    destination: str,
    source: str,
    hashes: dict[str, str],
    title: str,
    url: str,
    licence: str,
    kept: bool,
) -> None:
    """Write the README.md that names source, licence and conversion.

    Args:
        folder: Where to.
        name: What the model is called.
        config: Its configuration.
        destination: "gdino" or "transformers".
        source: What was converted.
        hashes: SHA-256 of the source's files by name.
        title: The layout, as people call it.
        url: Where checkpoints of the layout come from.
        licence: Of the weights.
        kept: Whether tensors lie beside the model.
    """
    card = _CARD.format(
        licence=licence,
        model_type="gdino" if destination == "gdino" else "transformers",
        name=name,
        source=source,
        title=title,
        url=url,
        hashes="".join(f"| SHA-256 of {file} | `{digest}` |\n" for file, digest in hashes.items()),
        kept="; tensors\nthat a detector does not need are in `conversion.safetensors`" if kept else "",
        usage="\n".join(_USAGE[destination]).replace("{name}", name),
        backbone=getattr(config.backbone_config, "model_type", "unknown"),
        text=getattr(config.text_config, "model_type", "unknown"),
        config=config,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
