"""A model as a function of texts: what it writes, what it finds likelier, and what that depends on."""

import pytest
import torch

from rlhf_env.errors import DataError
from rlhf_env.models.generation import continuation_log_odds, text_generator
from rlhf_env.text.codec import Codec
from tests.builders import ALPHABET, EOS, random_model

PROMPTS = ["abc", "d", "efghab", "ca", "h"]


def log_probs_after(model, ids: list[int]) -> torch.Tensor:
    """log P(next token), [11], by Hugging Face's own forward."""
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_greedy_text_is_the_likeliest_next_token_again_and_again():
    model = random_model()
    codec = Codec.of(model.tokenizer)
    for prompt, response in zip(PROMPTS, text_generator(model, max_new_tokens=5)(PROMPTS), strict=True):
        ids, letters = codec.encode_prompt(prompt), ""
        while len(ids) < len(codec.encode_prompt(prompt)) + 5:
            best = int(log_probs_after(model, ids).argmax())
            if best == EOS:
                break
            ids, letters = [*ids, best], letters + ALPHABET[best : best + 1]  # other special tokens are no text
        assert response == letters


def test_a_text_depends_on_seed_and_prompt_alone():
    model = random_model()
    generate = text_generator(model, max_new_tokens=8, greedy=False, seed=3, num_rows=2)
    together = generate(PROMPTS)
    assert together == [generate([prompt])[0] for prompt in PROMPTS] == generate(PROMPTS[::-1])[::-1]
    assert generate(["abc", "abc"]) == [together[0]] * 2
    assert text_generator(model, max_new_tokens=8, greedy=False, seed=4)(PROMPTS) != together
    assert generate([]) == []


def test_log_odds_are_of_the_whole_continuation():
    model = random_model()
    odds = continuation_log_odds(model, "a", "bc")(PROMPTS)
    for prompt, found in zip(PROMPTS, odds, strict=True):
        ids = Codec.of(model.tokenizer).encode_prompt(prompt)
        a = log_probs_after(model, ids)[0]
        bc = log_probs_after(model, ids)[1] + log_probs_after(model, [*ids, 1])[2]
        assert found == pytest.approx(float(a - bc), abs=1e-4)
    swapped = continuation_log_odds(model, "bc", "a")(PROMPTS)
    assert swapped.tolist() == pytest.approx((-odds).tolist())
    assert continuation_log_odds(model, "a", "b")([]).tolist() == []


def test_a_prompt_without_room_is_named():
    model = random_model()  # reads 64 tokens
    with pytest.raises(
        DataError, match=r"prompt 1 and what is written after it are \d+ tokens, but the model reads 64"
    ):
        text_generator(model, max_new_tokens=8)(["abc", "a" * 60])
    with pytest.raises(DataError, match="prompt 0 and what is written after it"):
        continuation_log_odds(model, "a", "b")(["a" * 64])
