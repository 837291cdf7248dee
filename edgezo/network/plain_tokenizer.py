"""The tokenizer of a trainable export, by the tokenizers library alone: what the data room asks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from edgezo.machine.foreign import reading
from edgezo.network.onnx_manifest import GRAPH_TOKENIZER, Manifest

_EXPORT_AGAIN = "Write the graphs again: edgezo export --format onnx --trainable."


class PlainTokenizer:
    """tokenizer.json, the roles of its special tokens, and the chat template.

    Names and results are those of a fast tokenizer of transformers, which the data room was written for.
    """

    def __init__(self, file: Tokenizer, about: Mapping[str, Any]):
        self._file = file
        self.special_tokens_map: dict[str, str] = dict(about["roles"])
        self.chat_template: str | None = about["chat_template"]
        self.edgezo_notes: tuple[str, ...] = tuple(about["notes"])
        # Texts of added tokens, by a number of no meaning: the data room asks for the texts.
        self.added_tokens_decoder: dict[int, str] = dict(enumerate(about["added"]))

    @staticmethod
    def of(manifest: Manifest) -> PlainTokenizer:
        """The tokenizer of an export. Raises EdgezoError for a file that is none."""
        path = manifest.file(GRAPH_TOKENIZER)
        with reading(path, _EXPORT_AGAIN, any_kind=True):
            file = Tokenizer.from_file(str(path))
            file.no_truncation()
            file.no_padding()
            return PlainTokenizer(file, manifest.values["tokenizer"])

    # -- special tokens -----------------------------------------------------------------------------------

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens_map.get(role)
        return None if text is None else self._file.token_to_id(text)

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    @property
    def mask_token_id(self) -> int | None:
        return self._id_of("mask_token")

    # -- texts and tokens ---------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Token ids, and with ``return_offsets_mapping`` (begin, end) of each in the text; of one text or of many."""
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        encoded = self._file.encode_batch(texts, add_special_tokens=add_special_tokens)
        made: dict[str, Any] = {"input_ids": [encoding.ids for encoding in encoded]}
        if return_offsets_mapping:
            made["offset_mapping"] = [encoding.offsets for encoding in encoded]
        return {name: values[0] for name, values in made.items()} if single else made

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of a number, or those of many."""
        if isinstance(ids, int):
            return self._file.id_to_token(ids)
        return [self._file.id_to_token(number) for number in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of tokens."""
        return str(self._file.decode(list(ids), skip_special_tokens=skip_special_tokens))
