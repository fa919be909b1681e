"""Weight-averaged reward models: one model of the mean weights, of members that differ in nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models.averaged import average_weights
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.heads import Disentangled, Groups, Head, MeanVariance, stored
from rlhf_env.text.tokenizers import char_tokenizer
from tests.reward_models.test_classifier import TEXTS, save

READ = [""] * len(TEXTS), TEXTS


def member(folder, seed: int = 0, **kwargs) -> ClassifierReward:
    save(folder, **kwargs)
    reward = ClassifierReward(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in reward.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return reward


def test_every_weight_is_the_mean_of_the_members(tmp_path):
    states = [member(tmp_path / "m", seed).model.state_dict() for seed in range(3)]
    models = [member(tmp_path / "m", seed) for seed in range(3)]
    averaged = average_weights(models).model.state_dict()
    for name, weight in averaged.items():
        a, b, c = (state[name].double() for state in states)
        torch.testing.assert_close(weight.double(), (a + b + c) / 3, atol=1e-7, rtol=1e-6)
    assert not any(averaged["score.weight"].equal(state["score.weight"]) for state in states)


def test_of_heads_on_one_body_it_is_their_mean_ensemble(tmp_path):
    """Only the last layer differs, and that is linear: the mean of the weights gives the mean of the logits."""
    models = [member(tmp_path / "m") for _ in range(2)]
    with torch.no_grad():
        models[1].model.score.weight.mul_(-3)
    expected = (models[0].logits(*READ) + models[1].logits(*READ)) / 2
    np.testing.assert_allclose(average_weights(models).score(*READ), expected, atol=1e-5)


def test_equal_models_are_that_model_bit_for_bit_and_none_is_changed(tmp_path):
    one = member(tmp_path / "m")
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    averaged = average_weights([one, one, one])
    assert all(torch.equal(weight, before[name]) for name, weight in averaged.model.state_dict().items())
    with torch.no_grad():
        averaged.model.score.weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in one.model.state_dict().items())


def test_folders_are_averaged_into_a_folder(tmp_path):
    for seed in range(2):
        member(tmp_path / "m", seed).save_pretrained(tmp_path / str(seed))
    average_weights([tmp_path / "0", str(tmp_path / "1")]).save_pretrained(tmp_path / "average")
    again = average_weights([member(tmp_path / "m", seed) for seed in range(2)])
    np.testing.assert_array_equal(ClassifierReward(tmp_path / "average").score(*READ), again.score(*READ))


def test_a_members_normaliser_is_not_the_averages(tmp_path):
    models = [member(tmp_path / "m", seed) for seed in range(2)]
    models[1].normalize_on(*READ)
    with pytest.raises(ConfigError, match="a member is normalised, .* give prompts and responses of a reference"):
        average_weights(models)
    scores = average_weights(models, *READ).score(*READ)
    assert scores.mean() == pytest.approx(0, abs=1e-6) and scores.std() == pytest.approx(1)
    assert average_weights([models[0], models[0]]).mean == 0
    with pytest.raises(ConfigError, match="give their prompts, too"):
        average_weights(models, responses=TEXTS)


def test_members_that_differ_in_more_than_weights_are_refused(tmp_path):
    one, two = member(tmp_path / "one"), tmp_path / "two"
    save(two, labels=2)
    save(tmp_path / "letters", tokenizer=char_tokenizer("abc"))
    other_eos = member(tmp_path / "eos")
    other_eos.model.config.update({"eos_token_id": 7})
    cases = {
        "no GPT2ForSequenceClassification": member(tmp_path / "llama", family="llama"),
        "another shape or name of score.weight": ClassifierReward(two, label=0),
        "another max_length": ClassifierReward(tmp_path / "one", max_length=5),
        "another of$": ClassifierReward(tmp_path / "one", of="response"),
        "another eos_token_id": other_eos,
        "another .*vocabulary": ClassifierReward(tmp_path / "letters"),
    }
    for message, other in cases.items():
        with pytest.raises(ConfigError, match=f"member 2 is not like member 0: .*{message}"):
            average_weights([one, one, other])
    with pytest.raises(ConfigError, match="differ in nothing else, .*: another label"):
        average_weights([ClassifierReward(two, label=0), ClassifierReward(two, label=1)])
    with pytest.raises(ConfigError, match="no reward models whose weights"):
        average_weights([])


def headed(folder, head: Head) -> ClassifierReward:
    save(folder, labels=len(head.labels))
    reward = ClassifierReward(folder, label=0)
    reward.model.config.update(stored(head))
    return ClassifierReward.from_model(reward.model, reward.tokenizer)


def test_logits_of_which_heads_make_different_numbers_are_not_averaged(tmp_path):
    """The shapes are the same: of a mean and its spread, of a quality and a length, of two groups."""
    heads = [MeanVariance(), MeanVariance(risk=1.0), Disentangled(), Groups(("a", "b"), (0.5, 0.5))]
    for a, b in itertools.permutations(heads, 2):
        with pytest.raises(ConfigError, match="another .*(head|risk)"):
            average_weights([headed(tmp_path / "a", a), headed(tmp_path / "b", b)])


def test_a_heads_own_moments_are_settled_anew(tmp_path):
    groups = [Groups(("a", "b"), (0.5, 0.5), means=(k, 0.0), stds=(1.0, 2.0)) for k in (0.0, 5.0)]
    averaged = average_weights([headed(tmp_path / "m", group) for group in groups], *READ)
    every = averaged.all_logits(*READ)
    assert averaged.head.means == pytest.approx(every.mean(0)) and averaged.head.stds == pytest.approx(every.std(0))
