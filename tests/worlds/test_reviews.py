"""The world that ships its models: it works at once, its reward means what it says, and it can be built again."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.text.corpus import film_reviews, review_openings
from rlhf_env.training.assemble import split_prompts
from rlhf_env.training.collect import collect
from rlhf_env.training.evaluate import response_texts
from rlhf_env.worlds import reviews

BUILT_BY = reviews.pipeline_config()
TRAIN, HELD_OUT = split_prompts(review_openings(), BUILT_BY.seed, BUILT_BY.eval_share)
EPISODES = 512


def responses_to(prompts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Fresh responses of the reference, as many to each prompt."""
    envs = reviews.make_vector_env(128, kl_mode="off")
    asked = [prompts[i % len(prompts)] for i in range(EPISODES)]
    return asked, response_texts(envs.task, collect(reviews.reference(), envs, asked, seed=seed))


def test_the_score_is_the_proxys_of_prompt_and_response():
    env = gym.make("rlhf_env/Reviews-v0", prompts=["the film is"], kl_mode="off")
    tokenizer = reviews.reference().tokenizer
    env.reset(seed=0)
    words, reward, over, info = [" very", " wonderful", ".", "<eos>"], 0.0, False, {}
    for token in tokenizer.convert_tokens_to_ids(words):
        assert not over
        _, reward, over, _, info = env.step(token)
    assert over and info["stop_reason"] == "eos"
    expected = ClassifierReward(reviews.ASSETS / "proxy").score(["the film is"], [" very wonderful."])
    assert reward == info["score"] == pytest.approx(expected[0], abs=1e-5)


def test_the_law_has_defaults_that_can_be_overridden():
    env = gym.make("rlhf_env/Reviews-v0").unwrapped
    assert env.core.beta == 0.1 and env.core.task.max_new_tokens == 24
    assert list(env.core.task.prompts) == review_openings()
    env = gym.make(
        "rlhf_env/Reviews-v0",
        beta=0.5,
        prompts=["it is", "this is"],
        max_new_tokens=3,
        temperature=0.7,
        reward_model=lambda prompts, responses: [7.0] * len(prompts),
    ).unwrapped
    task = env.core.task
    assert (env.core.beta, list(task.prompts), task.max_new_tokens) == (0.5, ["it is", "this is"], 3)
    assert task.law.temperature == 0.7
    env.reset(seed=0)
    with pytest.warns(UserWarning):
        for _ in range(3):
            *_, over, _, info = env.step(0)
    assert over and info["score"] == 7.0 and info["stop_reason"] == "length"


def test_models_are_shared_by_all_environments():
    one, many = gym.make("rlhf_env/Reviews-v0"), gym.make_vec("rlhf_env/Reviews-v0", num_envs=3)
    for env in (one.unwrapped, many.unwrapped):
        assert env.core.task.reference is reviews.reference()
    assert reviews.proxy() is reviews.proxy()
    assert not any(p.requires_grad for p in reviews.reference().parameters())


def test_fresh_responses_of_the_reference_score_mean_0_and_variance_1():
    """Normalised on 512 responses and measured on 512 others, so that both samples' errors count."""
    score = reviews.proxy().score(*responses_to(TRAIN, seed=123))
    error = np.sqrt(2 / EPISODES)  # of the mean, for variance 1: 0.0625
    assert abs(score.mean()) < 4 * error
    z = (score - score.mean()) / score.std()
    error = np.sqrt(2 * ((z**4).mean() - 1) / EPISODES)  # of the variance, by the kurtosis of these scores
    assert error < 0.15 and abs(score.var() - 1) < 4 * error


def test_the_proxy_knows_what_gold_likes_on_prompts_that_it_was_not_trained_on():
    prompts, first = responses_to(HELD_OUT, seed=5)
    _, second = responses_to(HELD_OUT, seed=6)
    lead = reviews.proxy().score(prompts, first) - reviews.proxy().score(prompts, second)
    better = reviews.gold().score(prompts, first) - reviews.gold().score(prompts, second)
    right = (lead * better > 0)[better != 0]
    assert len(right) > 200
    # With more than 200 pairs the share is known within ± 0.07; one that knows nothing has 0.5.
    assert right.mean() > 0.7


def test_the_reference_writes_reviews():
    """Most of what it says are words of the corpus in an order of the corpus, and it ends by itself."""
    envs = reviews.make_vector_env(64, kl_mode="off")
    rollout = collect(reviews.reference(), envs, TRAIN[:64], seed=1)
    assert rollout.ended.float().mean() > 0.9
    pairs = {pair for text in film_reviews() for pair in zip(text.split(), text.split()[1:], strict=False)}
    said = [p + r for p, r in zip(TRAIN[:64], response_texts(envs.task, rollout), strict=True)]
    found = [pair in pairs for text in said for pair in zip(text.split(), text.split()[1:], strict=False)]
    assert np.mean(found) > 0.9


def test_what_ships_is_small_and_says_nothing_about_where_it_was_made():
    files = [path for path in reviews.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1_300_000
    parameters = 0
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert not any("/" in value for value in (tensors.metadata() or {}).values())
                parameters += sum(tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118
        else:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if path.name != "tokenizer.json":  # its words may have any letters
                assert [text for text in texts_in(stored) if "/" in text or "\\" in text] == [], path
    assert 0 < parameters <= 300_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}  # nothing that could be code


def texts_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts_in(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.slow
def test_what_ships_can_be_built_again(tmp_path: Path):
    """`rlhf-env worlds build reviews` makes the models that the package ships."""
    built = reviews.build(tmp_path)
    ours, again = reviews.reference(), CausalLM.from_pretrained(built / "reference")
    assert again.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    texts = film_reviews()[:200]
    difference = (log_probs(again, texts) - log_probs(ours, texts)).abs()
    # Other processors and numbers of threads add up in another order. Two threads instead of one changed
    # log-probabilities by 2e-7 on average (2e-6 at most) and scores by 1e-5. It could be more where a sampled token of
    # the comparisons comes out another way, hence the wide berth; still, another seed is far off: by 0.04, with scores
    # that correlate by 0.86.
    assert difference.mean() < 1e-3
    prompts, responses = responses_to(TRAIN, seed=9)
    theirs = ClassifierReward(built / "proxy").score(prompts, responses)
    assert np.corrcoef(reviews.proxy().score(prompts, responses), theirs)[0, 1] > 0.99


def log_probs(policy: CausalLM, texts: list[str]) -> torch.Tensor:
    """Log-probability of every token of the texts but the first."""
    found = []
    for text in texts:
        ids = torch.tensor([policy.tokenizer.encode(text)])
        with torch.no_grad():
            logits, _ = policy(ids, torch.ones_like(ids, dtype=torch.bool))
        found.append(logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)
