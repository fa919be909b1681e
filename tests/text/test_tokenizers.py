import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_env.errors import ConfigError
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer, word_tokenizer

ALPHABET = "abc <>/eos\n\té😀"
SENTENCES = ["the film is good.", "the plot isn't\n good, 'ok'", "  two spaces\tand a tab"]

CHARS = char_tokenizer(ALPHABET)
WORDS = word_tokenizer(SENTENCES)
BYTES = byte_tokenizer()


@given(st.text(ALPHABET))
def test_characters_round_trip(text):
    ids = CHARS.encode(text, split_special_tokens=True)
    assert len(ids) == len(text)
    assert CHARS.decode(ids) == text


@given(st.text())
def test_bytes_are_the_ids_of_any_text(text):
    ids = BYTES.encode(text, split_special_tokens=True)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.lists(st.sampled_from([" film", " is", " good", " plot", " isn't", " spaces", "."])), st.sampled_from("\n\t"))
def test_known_words_round_trip_in_any_order(words, last):
    text = "the" + "".join(words) + last
    ids = WORDS.encode(text)
    assert len(ids) == len(words) + 2
    assert WORDS.decode(ids) == text


@pytest.mark.parametrize("text", SENTENCES)
def test_texts_of_the_vocabulary_round_trip(text):
    assert WORDS.decode(WORDS.encode(text)) == text


def test_character_ids_follow_the_alphabet():
    tokenizer = char_tokenizer("cab")
    assert tokenizer.encode("abc") == [1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (3, 4, 5)
    assert len(tokenizer) == 6


def test_without_special_tokens_the_vocabulary_is_the_alphabet():
    tokenizer = char_tokenizer("abcdefgh", special=False)
    assert len(tokenizer) == 8
    assert tokenizer.all_special_tokens == []
    assert tokenizer.encode("bed") == [1, 4, 3]


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_an_alphabet_without_distinct_characters_is_refused(alphabet):
    with pytest.raises(ConfigError, match="distinct"):
        char_tokenizer(alphabet)


def test_a_foreign_character_is_an_error_and_not_dropped():
    with pytest.raises(Exception, match="UNK"):
        char_tokenizer("ab").encode("abz")


def test_words_carry_their_space_and_the_frequent_ones_come_first():
    tokenizer = word_tokenizer(["go go go on", "go on"])
    vocab = tokenizer.get_vocab()
    #  counts: " go" 2, " on" 2, "go" 2; ties in alphabetical order
    assert [vocab[token] for token in (" go", " on", "go", "<unk>", "<bos>", "<eos>", "<pad>")] == list(range(7))
    assert tokenizer.encode("go on home") == [2, 1, 3]


def test_a_word_tokenizer_needs_words():
    with pytest.raises(ConfigError, match="none"):
        word_tokenizer([])


def test_half_a_character_decodes_to_a_replacement():
    assert BYTES.decode([0xF0, 0x9F]) == "\ufffd"
    assert BYTES.decode([0xF0, 0x9F, 0x98, 0x80]) == "😀"


@pytest.mark.parametrize(
    "tokenizer", [CHARS, WORDS, BYTES, char_tokenizer("abc", special=False)], ids=["char", "word", "byte", "bare"]
)
def test_a_saved_folder_loads_as_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.clean_up_tokenization_spaces is False
    for text in ("abc", "cab"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    if tokenizer.eos_token:
        typed = [loaded.encode("<eos>"), loaded.encode("<eos>", split_special_tokens=True)]
        assert typed[0] == [tokenizer.eos_token_id]
        assert tokenizer.eos_token_id not in typed[1]
