import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_env.errors import ConfigError
from rlhf_env.text.corpus import film_reviews
from rlhf_env.text.tokenizers import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer

ALPHABET = "abc <>/eos\n\té😀"
SENTENCES = ["the film is good.", "the plot isn't\n good, 'ok'", "  two spaces\tand a tab"]

CHARS = char_tokenizer(ALPHABET)
WORDS = word_tokenizer(SENTENCES)
BYTES = byte_tokenizer()
BPE = bpe_tokenizer(SENTENCES * 3, 300)


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


def test_merges_are_learned_in_order_of_frequency():
    # "aaab" twice and " aaab" twice: the pair aa occurs 8 times and ab 4 times; then a+b comes before aa+a, both 4
    # times, since bytes come before merges; then aa+ab, then the space. At last no pair is left.
    tokenizer = bpe_tokenizer(["aaab aaab", "aaab aaab"], 1000)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[256:]
    assert [token for token, _ in learned] == ["aa", "ab", "aaab", "Ġaaab", "<bos>", "<eos>", "<pad>"]
    assert tokenizer.encode("aaab aaabaa") == [258, 259, 256]
    assert len(tokenizer) == 263
    assert len(bpe_tokenizer(["aaab aaab"], 261)) == 261


@given(st.text())
def test_any_text_round_trips_through_merges(text):
    ids = BPE.encode(text, split_special_tokens=True)
    assert BPE.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_the_same_texts_give_the_same_merges():
    texts = film_reviews()[:500]
    first, second = (bpe_tokenizer(iter(texts), 600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 600
    assert [first.encode(text) for text in texts] == [second.encode(text) for text in texts]
    assert bpe_tokenizer(sorted(texts), 600).get_vocab() == first.get_vocab()  # only the counts matter


def test_no_merge_is_a_special_token_however_often_its_text_occurs():
    tokenizer = bpe_tokenizer(["<eos><eos> <eos>"] * 100, 300)
    ids = tokenizer.encode("<eos>", split_special_tokens=True)
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "<eos>"


def test_byte_pairs_need_texts_and_room_for_every_byte():
    with pytest.raises(ConfigError, match="at least 259 tokens"):
        bpe_tokenizer(["a"], 258)
    assert len(bpe_tokenizer(["a"], 259)) == 259
    with pytest.raises(ConfigError, match="none"):
        bpe_tokenizer(["", ""])


def test_half_a_character_decodes_to_a_replacement():
    assert BYTES.decode([0xF0, 0x9F]) == "\ufffd"
    assert BYTES.decode([0xF0, 0x9F, 0x98, 0x80]) == "😀"


@pytest.mark.parametrize(
    "tokenizer",
    [CHARS, WORDS, BYTES, BPE, char_tokenizer("abc", special=False)],
    ids=["char", "word", "byte", "bpe", "bare"],
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
