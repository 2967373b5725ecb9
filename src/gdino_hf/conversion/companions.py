"""The files beside converted weights: tokenizer, image processor and model card."""

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
"""Hub id of the tokenizer that all published checkpoints were trained with."""

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

A Grounding DINO detector ([Liu et al. 2023](https://arxiv.org/abs/2303.05499)): it finds the objects in an image that a
list of labels names.

## Source and conversion

These weights are not new. They were converted, tensor by tensor and without changing a value, from

| | |
|---|---|
| source | `{source}` |
| layout | {title}, [{url}]({url}) |
{hashes}

by the Python package `gdino-hf` (`gdino convert`). `conversion.json` says what happened to every tensor{kept}.

## Licence

{licence}, the licence of the weights published in this layout. Weights that someone else trained may have another
licence; if so, change the line at the top of this card.

## Use

```python
{usage}
```

| part | value |
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
    """Return whether the Hub answers for a repository; without it, a request for files would retry for minutes."""
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
    """Load a tokenizer from a folder, a vocab.txt or the Hub.

    Args:
        wanted: Path or Hub id.

    Returns:
        The tokenizer.

    Raises:
        ConversionError: The tokenizer cannot be loaded.
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
    # The loaders' exceptions for damaged or unreachable tokenizers have no common base class.
    except Exception as error:
        raise ConversionError(
            f"The tokenizer {wanted} cannot be loaded; give --tokenizer a folder or vocab.txt with BERT's uncased "
            "vocabulary, or go online."
        ) from error


def fitting_tokenizer(wanted: str, config: GDinoConfig) -> Any:
    """Load a tokenizer and check that the text encoder has an embedding for each of its ids.

    Raises:
        ConversionError: The tokenizer cannot be loaded, or its vocabulary is too large.
    """
    tokenizer = load_tokenizer(wanted)
    size = getattr(config.text_config, "vocab_size", len(tokenizer))
    if len(tokenizer) > size:
        raise ConversionError(
            f"The tokenizer {wanted} has {len(tokenizer)} entries, but the text encoder embeds {size}; give "
            "--tokenizer the one that the checkpoint was trained with."
        )
    return tokenizer


def delimiter_ids(tokenizer: Any) -> list[int] | None:
    """Return the ids of the tokens that separate phrases, or None if the vocabulary lacks one."""
    ids = tokenizer.convert_tokens_to_ids(_DELIMITERS)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if any(id is None or id == unknown for id in ids) else [int(id) for id in ids]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model's folder has a tokenizer."""
    return folder.is_dir() and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def image_processor_of(folder: Path) -> GDinoImageProcessor:
    """Load the folder's image processor, or make one with the published settings if it has none."""
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return GDinoImageProcessor.from_pretrained(folder)
    return GDinoImageProcessor()


def save_processor(
    folder: Path, tokenizer: Any, image_processor: GDinoImageProcessor, for_transformers: bool, max_text_len: int
) -> None:
    """Write tokenizer and image processor.

    Args:
        folder: Folder to write to.
        tokenizer: The tokenizer; None writes the image processor alone.
        image_processor: Our image processor.
        for_transformers: Whether to write them as transformers' own processor.
        max_text_len: Largest number of tokens in a prompt.
    """
    if not for_transformers:
        if tokenizer is None:
            image_processor.save_pretrained(folder)
        else:
            GDinoProcessor(image_processor, tokenizer, max_text_len=max_text_len).save_pretrained(folder)
        return
    from transformers import GroundingDinoImageProcessorPil, GroundingDinoProcessor

    settings = {name: value for name, value in image_processor.to_dict().items() if name != "image_processor_type"}
    theirs = GroundingDinoImageProcessorPil(**settings)
    if tokenizer is None:
        theirs.save_pretrained(folder)
    else:
        GroundingDinoProcessor(theirs, tokenizer).save_pretrained(folder)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the model card in a folder names, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"\A---\n(?:.*\n)*?license:[ ]*(\S+)\n(?:.*\n)*?---\n", text)
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
    """Write the model card README.md, which names source, licence and conversion.

    Args:
        folder: Folder to write to.
        name: Name of the model.
        config: Configuration of the model.
        destination: Layout of the model, "gdino" or "transformers".
        source: Hub id or file name of the converted checkpoint.
        hashes: SHA-256 of the source's files by file name.
        title: Name of the project that the source's layout comes from.
        url: Where checkpoints of that layout are published.
        licence: Licence of the weights.
        kept: Whether some of the source's tensors are stored beside the model.
    """
    card = _CARD.format(
        licence=licence,
        model_type="gdino" if destination == "gdino" else "transformers",
        name=name,
        source=source,
        title=title,
        url=url,
        hashes="".join(f"| SHA-256 of {file} | `{digest}` |\n" for file, digest in hashes.items()),
        kept=";\n`conversion.safetensors` has those that a detector does not need" if kept else "",
        usage="\n".join(_USAGE[destination]).replace("{name}", name),
        backbone=getattr(config.backbone_config, "model_type", "unknown"),
        text=getattr(config.text_config, "model_type", "unknown"),
        config=config,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
