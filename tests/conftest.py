"""Fixtures every room shares: a tiny random model with a vocabulary built on the spot, and the shared data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GDINO_SHARED", REPOSITORY.parent / "shared"))
REQUIRE_SHARED = os.environ.get("GDINO_REQUIRE_SHARED") == "1"

WORDS = (
    "cat dog person cup remote control red blue car tree face hat lion table chair bird ball bottle book phone the of "
    "traffic light left right small big cats dogs persons cups"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".?,;:!-'\"()[]/&+#"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where the shared folder must be present, a test that skips for want of it is a failure."""
    report = yield
    if REQUIRE_SHARED and report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if "shared" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"GDINO_REQUIRE_SHARED=1, yet this test was skipped: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    """Tests run one process per core; threads of their own would only fight over the cores."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files and data beside the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"shared folder {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """The photographs that ship with the demo."""
    return REPOSITORY / "demo" / "examples"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A BERT word-piece tokenizer of about 150 tokens: some whole words, single letters and their continuations.

    The special tokens take the ids 0 to 4 here, not BERT's 101, 102, 1012 and 1029: code that takes them from the
    tokenizer or the config passes, code that takes them from constants does not.
    """
    from transformers import BertTokenizerFast

    letters = list(LETTERS)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PUNCTUATION, *letters, *(f"##{x}" for x in letters)]
    tokens += [word for word in dict.fromkeys(WORDS.split()) if word not in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=256)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """A model of a few thousand parameters that has every part of the real one. Copy it before changing it."""
    from transformers import BertConfig, SwinConfig

    from gdino_hf.model.configuration_gdino import GDinoConfig

    special_tokens = ["[CLS]", "[SEP]", ".", "?"]
    return GDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            image_size=64,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=256,
        ),
        d_model=64,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        num_queries=20,
        num_denoising_queries=10,
        max_text_len=64,
        dropout=0.0,
        fusion_droppath=0.0,
        special_token_ids=tiny_tokenizer.convert_tokens_to_ids(special_tokens),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A random model in eval mode, shared by the session: leave its weights as they are."""
    import copy

    import torch

    from gdino_hf.model.modeling_gdino import GDinoForObjectDetection

    torch.manual_seed(0)
    return GDinoForObjectDetection(copy.deepcopy(tiny_config)).eval()


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer):
    """The processor of the tiny model, with pictures of 64 pixels."""
    from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
    from gdino_hf.model.processing_gdino import GDinoProcessor

    image_processor = GDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return GDinoProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_model, tiny_processor) -> Path:
    """The tiny model and its processor as saved on disk."""
    folder = tmp_path_factory.mktemp("tiny-gdino")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder
