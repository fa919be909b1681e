"""Supervised fine-tuning: what is learned, what is not, and that the numbers are those of the definitions."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlhf_env.errors import ConfigError, DataError, NonFiniteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import sample_responses
from rlhf_env.models.sft import (
    EncodedDemonstration,
    SFTConfig,
    encode_demonstrations,
    fit_demonstrations,
    mean_nll,
)
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.codec import Codec
from rlhf_env.text.demonstrations import Demonstration, load_demonstrations
from rlhf_env.text.tokenizers import byte_tokenizer, char_tokenizer
from rlhf_env.types import SamplingLaw
from tests.builders import ALPHABET, EOS, random_model

CODEC = Codec(char_tokenizer(ALPHABET))  # a … h are 0 … 7, EOS is 9
A, B, C, D = range(4)
ROWS = [
    EncodedDemonstration((A, B, C, D, EOS), 2),
    EncodedDemonstration((D, EOS), 1),
    EncodedDemonstration((C, C, C, A, B, 7, 6, EOS), 5),
    EncodedDemonstration((B, A, EOS), 2),
]
CHAT = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


class Bigrams(nn.Module):
    """A policy whose logits are a table: row = this token, column = the next. Looks at what it is given, no more."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, keep: int = 0) -> tuple[Tensor, None]:
        return self.table[input_ids][:, -keep:], None


def bigrams() -> Bigrams:
    return Bigrams([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 3, 1 / 3, 1 / 3]])


def encoded(*pairs: tuple[str, str], codec: Codec = CODEC, context_length: int | None = 64, **options):
    demonstrations = [Demonstration(*pair) for pair in pairs]
    return encode_demonstrations(codec, demonstrations, context_length=context_length, **options)


# --- encoding --------------------------------------------------------------------------------------


def test_the_response_and_its_end_are_learned_and_the_prompt_is_not():
    assert encoded(("ab", "cd"), ("d", "a")) == [
        EncodedDemonstration((A, B, C, D, EOS), 2),
        EncodedDemonstration((D, A, EOS), 1),
    ]


def test_plain_text_is_learned_whole_but_for_the_first_token():
    assert encoded(("", "abc")) == [EncodedDemonstration((A, B, C, EOS), 1)]


def test_text_after_a_bos_is_learned_from_its_first_token_and_prompts_have_one_bos(shared_data):
    policy = CausalLM.from_pretrained(shared_data / "models" / "stories260k-llama")
    tokenizer = policy.tokenizer  # BOS and EOS are the same token, 1
    text, both = encoded(("", "Once upon a time"), ("Once upon", " a time"), codec=Codec(tokenizer))
    body = tokenizer.encode("Once upon a time", add_special_tokens=False)
    prompt = tokenizer.encode("Once upon", add_special_tokens=False)
    assert text == EncodedDemonstration((1, *body, 1), 1)
    assert both == EncodedDemonstration((1, *body, 1), 1 + len(prompt))


def test_prompts_go_through_the_chat_template_and_plain_texts_do_not():
    codec = Codec(byte_tokenizer(), chat_template=CHAT)
    before = b"<user>hi</user><bot>"
    assert encoded(("hi", "yes"), ("", "yes"), codec=codec) == [
        EncodedDemonstration((*before, *b"yes", 257), len(before)),
        EncodedDemonstration((*b"yes", 257), 1),
    ]


def test_special_tokens_typed_in_a_demonstration_are_text():
    row, text = encoded(("<eos>", "<eos>"), ("", "<eos>"), codec=Codec(byte_tokenizer()))
    assert row.ids == (*b"<eos><eos>", 257) and text.ids == (*b"<eos>", 257)


def test_a_model_has_a_context_and_what_does_not_fit_is_refused_or_dropped():
    demonstrations = [Demonstration("a" * n, "b", f"t.jsonl:{n}") for n in (1, 3, 4, 5)]
    fits = encode_demonstrations(CODEC, demonstrations, context_length=7)
    assert [len(row.ids) for row in fits] == [3, 5, 6, 7]
    with pytest.raises(DataError) as caught:
        encode_demonstrations(CODEC, demonstrations, context_length=5)
    assert str(caught.value) == (
        "t.jsonl:4: 6 tokens, EOS included, do not fit the context of 5; 2 of 4 demonstrations are too long: "
        "leave them out with too_long=drop, or take a model with more context"
    )
    assert encode_demonstrations(CODEC, demonstrations, context_length=5, too_long="drop") == fits[:2]
    assert encode_demonstrations(CODEC, demonstrations, context_length=None) == fits
    with pytest.raises(DataError, match="^t.jsonl:1: 3 tokens.* 4 of 4 .* too long: take a model with more context$"):
        encode_demonstrations(CODEC, demonstrations, context_length=2, too_long="drop")


def test_what_cannot_be_encoded_is_named_by_its_place():
    with pytest.raises(DataError, match=r"^t\.txt:3: the tokenizer cannot encode 'xyz'"):
        encode_demonstrations(CODEC, [Demonstration("", "xyz", "t.txt:3")], context_length=None)
    with pytest.raises(DataError, match=r"^demonstration 1: the tokenizer cannot encode 'a!'"):
        encoded(("a", "b"), ("a", "!"))
    with pytest.raises(DataError, match="no demonstrations"):
        encoded()
    with pytest.raises(ConfigError, match="too_long must be 'error' or 'drop', got 'cut'"):
        encoded(("a", "b"), too_long="cut")


@pytest.mark.parametrize("learned_from", [-1, 0, 2])
def test_the_first_token_cannot_be_learned_and_one_must_be(learned_from):
    with pytest.raises(ValueError, match="learned_from must be 1 … 1"):
        EncodedDemonstration((A, EOS), learned_from)


# --- the loss, by hand -----------------------------------------------------------------------------


def first_loss(policy, rows) -> float:
    return next(fit_demonstrations(policy, rows, SFTConfig(batch_size=64)))["loss"]


@pytest.mark.parametrize(
    ("learned_from", "nll"),
    [
        (1, (math.log(4) - math.log(3 / 4) + math.log(8) + math.log(3)) / 4),  # 0→1, 1→1, 1→2, 2→2
        (2, (-math.log(3 / 4) + math.log(8) + math.log(3)) / 3),
        (4, math.log(3)),
    ],
)
def test_the_loss_is_that_of_the_learned_tokens(learned_from, nll):
    rows = [EncodedDemonstration((0, 1, 1, 2, 2), learned_from)]
    assert first_loss(bigrams(), rows) == pytest.approx(nll, abs=1e-6)
    assert mean_nll(bigrams(), rows) == pytest.approx(nll, abs=1e-6)


def test_every_learned_token_of_a_batch_weighs_the_same():
    rows = [EncodedDemonstration((0, 0, 1, 2), 3), EncodedDemonstration((0, 1, 2), 1)]
    expected = (math.log(8) + math.log(4) + math.log(8)) / 3  # 1→2 | 0→1, 1→2
    assert first_loss(bigrams(), rows) == pytest.approx(expected, abs=1e-6)
    assert mean_nll(bigrams(), rows, batch_size=1) == pytest.approx(expected, abs=1e-6)


def test_nothing_is_learned_of_what_the_prompt_says():
    policy = bigrams()
    before = policy.table.detach().clone()
    rows = [EncodedDemonstration((0, 0, 1, 2), 3)]  # only 1→2 is learned; 0→0 and 0→1 are the prompt's
    next(fit_demonstrations(policy, rows, SFTConfig(weight_decay=0.0)))  # type: ignore[arg-type]
    changed = (policy.table != before).any(1)
    assert changed.tolist() == [False, True, False]


def teacher_forced(policy: CausalLM, row: EncodedDemonstration) -> Tensor:
    """Σ log p of the learned tokens, one forward pass of the bare model per token."""
    total = torch.zeros((), dtype=policy.dtype)
    for t in range(row.learned_from, len(row.ids)):
        logits = policy.model(input_ids=torch.tensor([row.ids[:t]])).logits[0, -1]
        total = total + logits.log_softmax(-1)[row.ids[t]]
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_equals_that_of_each_token_predicted_alone(family):
    policy = random_model(family, dtype="float64")
    learned = sum(len(row.ids) - row.learned_from for row in ROWS)
    expected = -sum(teacher_forced(policy, row) for row in ROWS).item() / learned
    assert learned == 3 + 1 + 3 + 1
    assert mean_nll(policy, ROWS) == pytest.approx(expected, abs=1e-10)
    assert first_loss(policy, ROWS) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_held_out_loss_does_not_depend_on_the_batch(family):
    policy = random_model(family)
    sizes = [mean_nll(policy, ROWS, batch_size=size) for size in (1, 2, 3, 64)]
    assert max(sizes) - min(sizes) < 1e-6
    assert mean_nll(policy, ROWS[::-1], batch_size=3) == pytest.approx(sizes[0], abs=1e-6)


# --- learning --------------------------------------------------------------------------------------


def test_training_equals_a_plain_loop_over_single_rows():
    """AdamW on the summed loss of unpadded rows, over the count: no batch, no padding, no mask."""
    config = SFTConfig(learning_rate=3e-3, epochs=3, batch_size=4, weight_decay=0.1)
    policy, other = random_model(dtype="float64"), random_model(dtype="float64")
    steps = list(fit_demonstrations(policy, ROWS, config))
    parameters = list(other.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (3 - step) / 3
        optimizer.zero_grad()
        for row in ROWS:
            (-teacher_forced(other, row) / 8).backward()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_((1 / norm).clamp(max=1))
        optimizer.step()
        assert steps[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)
    for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    assert [(s["step"], s["steps"], s["tokens"]) for s in steps] == [(1, 3, 8), (2, 3, 16), (3, 3, 24)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order():
    def weights(seed):
        policy = random_model()
        for _ in fit_demonstrations(policy, ROWS, SFTConfig(batch_size=2, epochs=2), seed=seed):
            pass
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_last_smaller_batch_is_learned_too_and_every_row_once_per_epoch():
    steps = list(fit_demonstrations(random_model(), ROWS, SFTConfig(batch_size=3, epochs=2)))
    assert [s["steps"] for s in steps] == [4] * 4
    assert (steps[1]["tokens"], steps[3]["tokens"]) == (8, 16)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_model_learns_to_answer_and_to_stop_also_where_padding_is_eos(pad):
    tokenizer = char_tokenizer(ALPHABET)
    tokenizer.pad_token = pad
    policy = CausalLM.from_config(tiny_config("gpt2", len(tokenizer), n_layer=1, n_embd=32, n_head=2), tokenizer)
    pairs = [("a", "bc"), ("d", "e"), ("hhh", "g"), ("b", "abcde")]
    codec = Codec(tokenizer)
    rows = encode_demonstrations(codec, [Demonstration(*p) for p in pairs], context_length=policy.context_length)
    before = mean_nll(policy, rows)
    steps = list(fit_demonstrations(policy, rows, SFTConfig(learning_rate=1e-2, epochs=60, batch_size=4)))
    assert before > 2 and steps[-1]["loss"] < 0.1 and mean_nll(policy, rows) < 0.1
    prompts = [codec.encode_prompt(prompt) for prompt, _ in pairs]
    law = SamplingLaw(codec.vocab_size, EOS)
    samples = sample_responses(policy, prompts, law, max_new_tokens=8, seeds=[[i] for i in range(4)], greedy=True)
    answers = [ids[mask].tolist() for ids, mask in zip(samples.response_ids, samples.response_mask, strict=True)]
    assert samples.ended.all()
    assert codec.decode_responses(prompts, answers) == [response for _, response in pairs]


def test_a_real_model_learns_real_reviews(shared_data):
    policy = CausalLM.from_pretrained(shared_data / "models" / "stories260k-llama")  # knows stories, no reviews
    demonstrations = load_demonstrations(shared_data / "sentiment" / "rt_polarity.train.jsonl")[:96]
    rows = encode_demonstrations(Codec(policy.tokenizer), demonstrations, context_length=policy.context_length)
    before = mean_nll(policy, rows[64:])
    for _ in fit_demonstrations(policy, rows[:64], SFTConfig(batch_size=16, epochs=2)):
        pass
    assert mean_nll(policy, rows[64:]) < before - 0.3


# --- what is refused -------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_not_taken():
    policy = random_model()
    with torch.no_grad():
        policy.model.transformer.wte.weight[C, 0] = torch.nan  # type: ignore[union-attr]
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match="step 0; the step was not taken"):
        next(fit_demonstrations(policy, ROWS))
    assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(policy.parameters(), before, strict=True))
    with pytest.raises(NonFiniteError, match="not finite"):
        mean_nll(policy, ROWS)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="to learn from"):
        next(fit_demonstrations(random_model(), []))
    with pytest.raises(DataError, match="to measure on"):
        mean_nll(random_model(), [])


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"epochs": 0},
        {"batch_size": 0},
        {"weight_decay": -1.0},
        {"weight_decay": math.inf},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError):
        SFTConfig(**setting)
