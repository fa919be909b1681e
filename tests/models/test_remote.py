"""A model behind a server: what it is asked for, what of its answers is believed, and that the numbers are the model's.

The server holds the tests' tiny model, so everything that it says can be compared with the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_env.errors import ConfigError, RemoteError
from rlhf_env.models.remote import RemoteLM
from rlhf_env.models.sampling import Responder, Samples, sample_responses
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.settings import HTTPConfig, ServerConfig
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Rollout, SamplingLaw
from tests.builders import ALPHABET, EOS, random_model
from tests.serving import Served, serving_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2, 3, 4], [2, 2], [7, 1], [3], [1, 2, 3]]
LAW = SamplingLaw(11, EOS)
CONFIG = ServerConfig(model="tiny", tokenizer="tests/letters", http=HTTPConfig(read_timeout=5.0, attempts=1))


def remote(served: Served, config: ServerConfig = CONFIG, tokenizer: Any = None) -> RemoteLM:
    return RemoteLM(served.url, tokenizer or random_model().tokenizer, config)


def asked(policy: Any, law: SamplingLaw = LAW, *, limit: Any = 8, prompts=PROMPTS, seed: int = 0, **kwargs) -> Samples:
    seeds = [[seed, i] for i in range(len(prompts))]
    ask = (
        policy.sample_responses if isinstance(policy, Responder) else lambda *a, **k: sample_responses(policy, *a, **k)
    )
    return ask(prompts, law, max_new_tokens=limit, seeds=seeds, **kwargs)


def responses(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.response_ids, samples.response_mask, strict=True)]


def test_it_answers_and_is_no_policy_that_could_learn():
    policy = RemoteLM("http://127.0.0.1:9/v1/", random_model().tokenizer, CONFIG)
    assert isinstance(policy, Responder) and not isinstance(random_model(), Responder)
    assert not hasattr(policy, "parameters") and not hasattr(policy, "decoder")
    assert policy.url == "http://127.0.0.1:9/v1"


def test_log_probabilities_are_those_of_the_same_weights():
    model, prompts = random_model(), 4 * PROMPTS
    with serving_model(model) as served:
        drawn = asked(remote(served), prompts=prompts, reference=model)
    lengths = drawn.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 2, "responses of several lengths"
    rollout = Rollout.of_tokens(prompts, responses(drawn), LAW)
    assert drawn.logp.shape == drawn.values.shape == drawn.response_ids.shape == (28, max(lengths))
    assert torch.allclose(drawn.logp, teacher_forced_logp(model, rollout), atol=1e-4)
    assert not drawn.logp[~drawn.response_mask].any() and not drawn.values.any()
    assert drawn.ended.tolist() == [r[-1] == EOS for r in responses(drawn)]
    assert all(len(r) == 8 for r, ended in zip(responses(drawn), drawn.ended.tolist(), strict=True) if not ended)


def test_greedy_it_writes_what_the_model_writes():
    model = random_model()
    with serving_model(model) as served:
        theirs, ours = asked(remote(served), greedy=True), asked(model, greedy=True)
    assert all(body["temperature"] == 0 for _, body in served.asked)
    assert torch.equal(theirs.response_ids, ours.response_ids)
    assert torch.equal(theirs.response_mask, ours.response_mask)
    assert torch.equal(theirs.ended, ours.ended)
    assert torch.allclose(theirs.logp, ours.logp, atol=1e-4)


def test_every_setting_that_shapes_the_law_is_said():
    with serving_model(random_model()) as served:
        asked(remote(served), SamplingLaw(11, EOS, temperature=0.7), limit=[1, 2, 3, 4, 5, 6, 7])
    paths, bodies = zip(*served.asked, strict=True)
    assert set(paths) == {"/v1/completions"}
    assert sorted((b["prompt"], b["max_tokens"]) for b in bodies) == sorted(zip(PROMPTS, range(1, 8), strict=True))
    shared = {name: value for name, value in bodies[0].items() if name not in ("prompt", "max_tokens", "seed")}
    assert shared == {
        "model": "tiny",
        "temperature": 0.7,
        "n": 1,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_seeds_depend_on_seed_and_position_alone_and_a_server_that_keeps_them_repeats_itself():
    with serving_model(random_model()) as served:
        policy = remote(served)
        once, again, other = asked(policy), asked(policy, num_rows=1), asked(policy, seed=1)
        few = asked(policy, prompts=PROMPTS[:2])
    assert responses(once) == responses(again) != responses(other)
    assert responses(few) == responses(once)[:2]
    assert responses(once)[0] != responses(once)[6], "the same prompt at another position"
    seeds = [body["seed"] for _, body in served.asked]
    assert Counter(Counter(seeds).values()) == {3: 2, 2: 5, 1: 7}
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert served.at_once > 1


def test_a_stop_ends_a_response_where_it_would_have_ended_locally():
    """The server writes on; what it wrote up to the stop is what the model would have written."""
    model = random_model()
    told: list[int] = []
    with serving_model(model) as served:
        whole = responses(asked(remote(served)))
        stopped = asked(remote(served), stop=lambda prompt, ids: ids[-1] == 3 and len(prompt) < 7, progress=told.append)
    assert not any("stop" in body for _, body in served.asked)
    for prompt, before, after, ended in zip(PROMPTS, whole, responses(stopped), stopped.ended.tolist(), strict=True):
        n = next((i for i, t in enumerate(before, 1) if t == EOS or (t == 3 and len(prompt) < 7)), None)
        assert after == before[:n] and ended == (n is not None)
    assert any(a != b for a, b in zip(whole, responses(stopped), strict=True))
    assert sum(told) == len(PROMPTS)


Change = Callable[[dict[str, Any]], Any]


def altered(**changes: Any) -> Change:
    """An answer with other values in its choice, each a value or a function of the present one; `...` takes it away."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        for name, value in changes.items():
            new = value(choice.get(name)) if callable(value) else value
            choice.pop(name, None) if new is ... else choice.update({name: new})
        return answer

    return change


def without_token_ids(logprobs: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": ["?"] * len(logprobs["tokens"]), "token_logprobs": logprobs["token_logprobs"]}


def as_llama_cpp(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    ids, logp = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    content = [{"id": token, "token": "?", "logprob": number} for token, number in zip(ids, logp, strict=True)]
    kept = {name: choice[name] for name in ("index", "text", "finish_reason")}
    return {"choices": [{**kept, "logprobs": {"content": content}}]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda answer: answer, id="token_ids"),
        pytest.param(altered(token_ids=..., stop_reason=..., prompt_token_ids=...), id="token_id:N"),
        pytest.param(altered(logprobs=without_token_ids), id="token_ids and text"),
        pytest.param(altered(text=...), id="no text"),
        pytest.param(altered(matched_stop=EOS), id="SGLang"),
        pytest.param(as_llama_cpp, id="llama.cpp"),
    ],
)
def test_token_ids_may_come_in_several_ways(change):
    model = random_model()
    with serving_model(model) as plain, serving_model(model, change) as served:
        expected, drawn = asked(remote(plain), reference=model), asked(remote(served), reference=model)
    assert responses(drawn) == responses(expected)
    assert torch.equal(drawn.logp, expected.logp) and torch.equal(drawn.ended, expected.ended)


def leave_eos_out(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    if choice["token_ids"][-1] == EOS:
        for numbers in (choice["token_ids"], *choice["logprobs"].values()):
            numbers.pop()
    return answer


def test_an_eos_that_the_server_leaves_out_is_written_and_has_no_log_probability():
    model = random_model()
    with serving_model(model) as plain, serving_model(model, leave_eos_out) as served:
        expected, drawn = asked(remote(plain)), asked(remote(served))
        with pytest.raises(RemoteError, match=r"response to prompt \d ended, .* not say the log-probability of EOS"):
            asked(remote(served), reference=model)
    assert responses(drawn) == responses(expected)
    eos = drawn.response_ids == EOS
    assert eos.any() and not drawn.logp[eos].any()
    assert torch.equal(drawn.logp[~eos], expected.logp[~eos])
    assert torch.equal(drawn.ended, expected.ended)


def write_past_eos(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    more = 8 - len(choice["token_ids"])
    choice["token_ids"] += [3] * more
    choice["logprobs"]["tokens"] += ["token_id:3"] * more
    choice["logprobs"]["token_logprobs"] += [-1.0] * more
    choice["finish_reason"] = "length"
    del choice["text"]
    return answer


def test_what_a_server_writes_past_eos_is_no_part_of_the_response():
    model = random_model()
    with serving_model(model) as plain, serving_model(model, write_past_eos) as served:
        expected, drawn = asked(remote(plain)), asked(remote(served))
    assert responses(drawn) == responses(expected) and torch.equal(drawn.ended, expected.ended)
    assert torch.equal(drawn.logp, expected.logp)


def some(index: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda numbers: [value if i == index else number for i, number in enumerate(numbers)]


def logp(change: Callable[[list[Any]], Any]) -> Change:
    return altered(logprobs=lambda said: {**said, "token_logprobs": change(said["token_logprobs"])})


WRONG: dict[str, tuple[Change, str]] = {
    "a list": (lambda answer: [answer], "is no completion with one choice"),
    "an error with status 200": (
        lambda answer: {"error": {"message": "overloaded"}},
        "is no completion with one choice",
    ),
    "no choice": (lambda answer: {**answer, "choices": []}, "is no completion with one choice"),
    "two choices": (lambda answer: {"choices": answer["choices"] * 2}, "is no completion with one choice"),
    "a choice that is text": (lambda answer: {"choices": ["abc"]}, "is no completion with one choice"),
    "text only": (altered(token_ids=..., logprobs=None), 'has no token ids.*"return_token_ids" .vLLM'),
    "tokens as text": (altered(token_ids=..., logprobs=without_token_ids), "has no token ids"),
    "a token id that is text": (altered(token_ids=some(0, "1")), "has no token ids"),
    "a token id that is true": (altered(token_ids=some(0, True)), "has no token ids"),
    "a token id that is 1.0": (altered(token_ids=some(0, 1.0)), "has no token ids"),
    "a token id too large": (altered(token_ids=some(0, 11)), "holds the token 11, but the tokenizer has 11"),
    "a token id below 0": (altered(token_ids=some(0, -1)), "holds the token -1"),
    "no log-probabilities": (altered(logprobs=None), 'has no log-probabilities: the server must know "logprobs"'),
    "a log-probability too few": (logp(lambda n: n[1:]), r"has \d tokens, but \d log-probabilities"),
    "a log-probability too many": (logp(lambda n: [*n, -1.0]), r"has \d tokens, but \d log-probabilities"),
    "a log-probability that is none": (logp(some(0, None)), "has None for the log-probability"),
    "a log-probability that is text": (logp(some(0, "-1\x1b[2J")), "has '-1.*' for the log-probability"),
    "a log-probability that is false": (logp(some(0, False)), "has False for the log-probability"),
    "a log-probability above 0": (logp(some(0, 0.1)), "has 0.1 for the log-probability"),
    "a probability of 0": (logp(some(0, -9999.0)), "has -9999.0 for the log-probability"),
    "a log-probability of NaN": (logp(some(0, float("nan"))), r"not JSON \(it holds NaN\)"),
    "an infinite log-probability": (logp(some(0, float("-inf"))), r"not JSON \(it holds -Infinity\)"),
    "a number beyond all": (logp(some(0, -(10**400))), "for the log-probability"),
    "aborted": (altered(finish_reason="abort"), "was not finished: finish_reason is 'abort'"),
    "not finished": (altered(finish_reason=None), "was not finished: finish_reason is None"),
    "another prompt": (altered(prompt_token_ids=lambda ids: [8, *ids]), "is one to another prompt"),
    "cut by the server's context": (
        altered(
            finish_reason="length",
            token_ids=[1],
            logprobs={"token_logprobs": [-1.0]},
        ),
        "has 1 tokens where 8 were to be the most and finish_reason is length: is the server's context too short",
    ),
    "longer than asked for": (
        altered(finish_reason="length", token_ids=[1] * 9, logprobs={"token_logprobs": [-1.0] * 9}),
        "has 9 tokens where 8 were to be the most",
    ),
    "no room for its EOS": (
        altered(finish_reason="stop", stop_reason=None, token_ids=[1] * 8, logprobs={"token_logprobs": [-1.0] * 8}),
        "has 9 tokens where 8 were to be the most",
    ),
    "another EOS": (
        altered(finish_reason="stop", stop_reason=10, token_ids=[1, 10], logprobs={"token_logprobs": [-1.0] * 2}),
        "was ended by 10, not by the tokenizer's EOS, 9",
    ),
    "a stop string that was not asked for": (
        altered(finish_reason="stop", matched_stop="x", token_ids=[1], logprobs={"token_logprobs": [-1.0]}),
        "was ended by 'x', not by the tokenizer's EOS, 9",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_none_is_refused_in_one_line_that_names_server_and_prompt(name):
    change, message = WRONG[name]
    with serving_model(random_model(), change) as served, pytest.raises(RemoteError, match=message) as caught:
        asked(remote(served), num_rows=1)
    assert str(caught.value).startswith(f"{served.url}/completions")
    assert "prompt 0" in str(caught.value) or "not JSON" in str(caught.value)
    assert str(caught.value).isprintable()


def test_nothing_more_is_asked_of_a_server_whose_answers_are_none():
    with serving_model(random_model(), altered(token_ids=..., logprobs=None)) as served:
        with pytest.raises(RemoteError, match="has no token ids"):
            asked(remote(served), prompts=30 * PROMPTS, num_rows=2)
        assert len(served.asked) < 10


def test_another_vocabulary_of_the_same_size_is_noticed_by_its_text():
    with serving_model(random_model()) as served:
        policy = remote(served, tokenizer=char_tokenizer(ALPHABET[::-1]))
        with pytest.raises(RemoteError, match='has another vocabulary than tests/letters: its "[a-h]+" reads "[a-h]+"'):
            asked(policy)


def test_a_text_that_differs_here_and_there_is_no_other_vocabulary():
    half = altered(text=lambda text: f" {text[:2]}\ufffd{text[2:]}")
    with serving_model(random_model(), half) as served:
        asked(remote(served))


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"top_k": 5}, "top_k and top_p are judged by the reference"),
        ({"top_p": 0.9}, "top_k and top_p are judged by the reference"),
        ({"min_new_tokens": 1}, "min_new_tokens and banned_tokens"),
        ({"banned_tokens": (3,)}, "min_new_tokens and banned_tokens"),
        ({"eos_token_id": None}, "stop_at_eos=False"),
    ],
)
def test_a_law_that_servers_do_not_follow_exactly_is_refused_before_anything_is_asked(law, message):
    with serving_model(random_model()) as served:
        with pytest.raises(ConfigError, match=message):
            asked(remote(served), SamplingLaw(**({"vocab_size": 11, "eos_token_id": EOS} | law)))
        assert not served.asked


def test_log_probabilities_of_another_law_are_not_compared_with_a_references():
    model, hot = random_model(), SamplingLaw(11, EOS, temperature=1.5)
    processed = ServerConfig(model="tiny", logprobs="processed", http=CONFIG.http)
    with serving_model(model) as raw, serving_model(model, processed=True) as served:
        asked(remote(raw), hot)  # without a reference nobody looks at them
        with pytest.raises(ConfigError, match=r"at temperature 1\.5 there is no KL.*server\.logprobs=processed"):
            asked(remote(raw), hot, reference=model)
        drawn = asked(remote(served, processed), hot, reference=model)
        with pytest.raises(ConfigError, match=r"greedy.*server\.logprobs=raw"):
            asked(remote(served, processed), hot, reference=model, greedy=True)
    rollout = Rollout.of_tokens(PROMPTS, responses(drawn), hot)
    assert torch.allclose(drawn.logp, teacher_forced_logp(model, rollout), atol=1e-4)


def test_names_that_are_missing_or_lead_nowhere(tmp_path):
    with pytest.raises(ConfigError, match="needs server.model"):
        RemoteLM("http://host/v1", None, ServerConfig())
    with pytest.raises(ConfigError, match="needs server.tokenizer"):
        RemoteLM.connect("http://host/v1", ServerConfig(model="tiny"))
    with pytest.raises(ConfigError, match=f"cannot load a tokenizer from {tmp_path}"):
        RemoteLM.connect("http://host/v1", ServerConfig(model="tiny", tokenizer=str(tmp_path)))
