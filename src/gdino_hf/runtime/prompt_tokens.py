"""The tokenizer of an exported model, with what `gdino_hf.model.text_prompt` asks of transformers' tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..detection.exported_folder import ExportedFolder, ExportError
from ..model.printable import printable


class PromptTokenizer:
    """A tokenizer of the package tokenizers.

    Args:
        folder: Exported folder with a tokenizer.json.

    Attributes:
        cls_token_id: Token that begins a prompt.
        sep_token_id: Token that ends a prompt.
        unk_token_id: Token of unknown words; None if there is none.
        pad_token_id: Token that fills a prompt of fixed length.

    Raises:
        ExportError: The tokenizer cannot be read.
    """

    def __init__(self, folder: ExportedFolder) -> None:
        from tokenizers import Tokenizer

        file = folder.path / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ExportError(
                f"{printable(file)} cannot be read ({printable(error, limit=100)}); export the model again."
            ) from error
        # A file may say how its tokenizer pads and cuts; labels are neither padded nor cut.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        text = folder.text
        self.cls_token_id, self.sep_token_id = text.get("start_id"), text.get("end_id")
        self.unk_token_id, self.pad_token_id = text.get("unknown_id"), int(text.get("pad_id") or 0)
        # `special_token_ids` asks for these where a tokenizer has no tokens of the other names.
        self.bos_token_id = self.eos_token_id = None

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """Return the tokens of texts, without those that begin and end a prompt."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return {"input_ids": [each.ids for each in encoded]}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token; that of unknown words, or None, if there is no such token."""
        found = self._tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the texts of tokens."""
        return [str(self._tokenizer.id_to_token(token)) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that tokens stand for."""
        return str(self._tokenizer.decode(list(ids)))
