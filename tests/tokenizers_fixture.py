"""Small tokenizers of the three usual makes, trained in a moment on the bundled example.

Each knows the words of WORDS as one token with a space before them.
"""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgezo.data.tasks import EXAMPLE_FOLDER

WORDS = ("good", "bad", "yes", "no", "alarm", "weather", "music", "great", "terrible")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache
def _corpus() -> list[str]:
    lines = (EXAMPLE_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = [f"it was {word}" for word in WORDS for _ in range(200)]
    return [json.loads(line)["text"] for line in lines] + words


def _train(tokenizer: Tokenizer, specials: list[str], vocab: int, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)


@lru_cache
def _byte_level(specials: tuple[str, ...], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(tokenizer, list(specials), vocab, pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def byte_tokenizer(vocab: int = 600) -> PreTrainedTokenizerFast:
    """GPT-2 and SmolLM2 style: bytes, spaces inside tokens, no start token; a chat template."""
    tokenizer = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), vocab)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def piece_tokenizer(vocab: int = 600) -> PreTrainedTokenizerFast:
    """Llama 2 and Gemma style: ▁ marks a word's start, <s> comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    _train(tokenizer, ["<unk>", "<s>", "</s>", *fallback], vocab + 256, [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def masked_tokenizer(vocab: int = 600) -> PreTrainedTokenizerFast:
    """RoBERTa style: bytes, <s> ... </s> around a text, <mask> takes the space before it."""
    tokenizer = Tokenizer.from_str(_byte_level(("<s>", "</s>", "<unk>"), vocab).to_str())
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")),
        ("<s>", tokenizer.token_to_id("<s>")),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
