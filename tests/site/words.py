"""Tokenizers as models bring them, made on the spot: byte-level, by pieces of words, by SentencePiece's blanks."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]
TEXTS = [f"patient {i} is {('calm', 'ill', 'well')[i % 3]} and walks {'äöü€'[i % 4]} today" for i in range(40)]


def _trained(model: Any, trainer: Any, texts: Iterable[str], **parts: Any) -> Tokenizer:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(texts, trainer)
    return made


def byte_level(prefix: bool = False, trimmed: bool = True, size: int = 330, more: Sequence[str] = ()) -> Tokenizer:
    """As GPT-2, RoBERTa (`prefix`: a blank before the first word), Llama 3 and Qwen."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(
        models.BPE(), trainer, [*TEXTS, *more],
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=trimmed),
    )  # fmt: skip


def word_pieces() -> Tokenizer:
    """As BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"), trainer, TEXTS,
        normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )  # fmt: skip


def unigram(scheme: str = "always") -> Tokenizer:
    """As XLM-R and T5."""
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    blanks = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(models.Unigram(), trainer, TEXTS, pre_tokenizer=blanks, decoder=decoder)


def sentence_pieces() -> Tokenizer:
    """As Llama 2 and Mistral: blanks are letters, and a text is one word."""
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, show_progress=False)
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _trained(models.BPE(unk_token="<unk>"), trainer, TEXTS, normalizer=blanks)


def fast(made: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    ends: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **ends | more)


def between(made: Tokenizer, before: str = "", after: str = "") -> Tokenizer:
    """The same, putting special tokens around a text."""
    around = [*before.split(), *after.split()]
    template = processors.TemplateProcessing(
        single=" ".join([*before.split(), "$A", *after.split()]),
        special_tokens=[(token, made.token_to_id(token)) for token in dict.fromkeys(around)],
    )
    kept = [made.post_processor] if made.post_processor else []
    made.post_processor = processors.Sequence([*kept, template])
    return made


def kinds() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte-level": fast(byte_level()),
        "byte-level, offsets with blanks": fast(byte_level(trimmed=False)),
        "byte-level, a blank first": fast(between(byte_level(prefix=True), "<s>", "</s>")),
        "word pieces": fast(between(word_pieces(), "<s>", "</s>")),
        "unigram": fast(between(unigram(), "<s>", "</s>")),
        "unigram, no blank first": fast(unigram("never")),
        "sentence pieces": fast(between(sentence_pieces(), "<s>")),
    }
