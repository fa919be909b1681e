"""Built-in tokenizers, lossless and made on the spot, so that nothing here needs the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_env.errors import ConfigError

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"


def char_tokenizer(alphabet: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, in that order from id 0; `<bos>`, `<eos>`, `<pad>` follow.

    A character outside the alphabet is an error rather than an unknown token. Without `special` the vocabulary is the
    alphabet and nothing else.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ConfigError(f"an alphabet needs distinct characters, at least one; got {alphabet!r}")
    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(alphabet)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD) if special else _wrap(tokenizer)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word and mark of `texts`, the most frequent first; then `<unk>`, `<bos>`, `<eos>`, `<pad>`.

    A token carries the space before it ("film" and " film" are two), so that joining tokens gives the text back.
    """
    split = pre_tokenizers.Split(Regex(r" ?[\w']+| ?[^\w\s']|\s"), "isolated")
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    if not words:
        raise ConfigError("a word tokenizer needs texts to take its words from; got none")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, UNK])}, unk_token=UNK))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, id = byte value, for any text at all; `<bos>` 256, `<eos>` 257, `<pad>` 258."""
    # ByteLevel writes printable Latin-1 bytes as themselves and the others, in order, from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learned from `texts`, as GPT-2's is (Sennrich et al. 2016, arXiv 1508.07909).

    The 256 bytes come first, then the merges in the order in which they were learned, then `<bos>`, `<eos>`, `<pad>`:
    `vocab_size` tokens in all, or fewer where no pair of tokens occurs twice any more. Any text at all comes back from
    its ids, and the same texts always give the same vocabulary.
    """
    learned = vocab_size - 3
    if learned < 256:
        raise ConfigError(f"a byte-pair vocabulary needs at least 259 tokens (256 bytes, 3 special), got {vocab_size}")
    texts = [text for text in texts if text]
    if not texts:
        raise ConfigError("a byte-pair tokenizer needs texts to learn from; got none")
    tokenizer = Tokenizer(models.BPE())
    # Its pattern keeps letters and marks apart, so that no merge can build the text of a special token.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=learned,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return _wrap(tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    # Special tokens are added, never part of the model's own vocabulary: there, typed text could become one.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
