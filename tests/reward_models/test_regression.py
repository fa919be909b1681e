"""Ratings: a number for each response is predicted in its own unit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import measure_comparisons, new_reward_model
from rlhf_env.reward_models.heads import Rated
from rlhf_env.reward_models.regression import Rating, fit_ratings, measure_ratings, read_ratings
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison
from tests.reward_models.test_bradley_terry import write_body


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return write_body(tmp_path_factory.mktemp("body"))


def rated(count, seed):
    """Ten points, and ten more for a +."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcd"), 6)) + rng.choice(["+", "-"]) for _ in range(count)]
    return [Rating("p ", text, 20.0 if "+" in text else 10.0) for text in texts]


def test_the_first_step_is_the_squared_error_of_standardised_ratings(body):
    reward = new_reward_model(body, head=Rated(), dtype=torch.float64)
    a, b = reward.logits(["p ", "p "], ["good", "bad"])
    row = next(fit_ratings(reward, [Rating("p ", "good", 9.0), Rating("p ", "bad", 5.0)]))  # mean 7, deviation 2
    assert row["loss"] == pytest.approx(((a - 1) ** 2 + (b + 1) ** 2) / 2)


def test_ratings_are_predicted_in_their_unit_and_kept(body, tmp_path):
    reward = new_reward_model(body, head=Rated())
    list(fit_ratings(reward, rated(128, 0), BradleyTerryConfig(learning_rate=1e-2, epochs=10, batch_size=16)))
    measured = measure_ratings(reward, rated(64, 1))
    assert measured["rmse"] < 2 and measured["correlation"] > 0.9
    assert reward.score(["p "], ["abcabc+"]) == pytest.approx(20, abs=3)
    reward.normalize_on(["p "] * 2, ["abcabc+", "abcabc-"])
    assert reward.score(["p "], ["abcabc+"]) == pytest.approx(1)
    assert measure_ratings(reward, rated(64, 1)) == measured
    reward.save_pretrained(tmp_path)
    again = load_reward(str(tmp_path))
    np.testing.assert_array_equal(again.score(["p "], ["abcabc+"]), reward.score(["p "], ["abcabc+"]))
    found = measure_comparisons(again, [Comparison("p ", ("abcabc+", "abcabc-"), (0, 1))])
    assert found["accuracy"] == 1 and not {"log_loss", "ece", "brier"} & found.keys()  # it states no probability


def test_measures_by_hand():
    class Known:
        def logits(self, prompts, responses):
            return np.array([float(r) for r in responses])

    measured = measure_ratings(Known(), [Rating("", "1", 1.0), Rating("", "2", 4.0), Rating("", "3", 5.0)])
    assert measured["rmse"] == pytest.approx(np.sqrt((0 + 4 + 4) / 3))
    assert measured["correlation"] == pytest.approx(4 / np.sqrt(2 * (26 / 3)))
    assert "correlation" not in measure_ratings(Known(), [Rating("", "1", 1.0), Rating("", "2", 1.0)])
    with pytest.raises(DataError, match="no ratings"):
        measure_ratings(Known(), [])


def test_ratings_in_files(tmp_path):
    file = tmp_path / "ratings.jsonl"
    rows = [{"prompt": "p", "response": "r", "rating": 3, "by": "ann"}, {"prompt": "p", "response": "s", "rating": 2.5}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_ratings(file) == [Rating("p", "r", 3.0), Rating("p", "s", 2.5)]
    for wrong, message in (({"rating": "3"}, "rating"), ({"rating": True}, "rating"), ({"response": None}, "response")):
        file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | wrong))
        with pytest.raises(DataError, match=f"ratings.jsonl:2.*{message}"):
            read_ratings(file)


def test_what_cannot_be_learned_from(body):
    with pytest.raises(DataError, match="2 ratings that do not differ"):
        next(fit_ratings(new_reward_model(body, head=Rated()), [Rating("", "a", 1.0), Rating("", "b", 1.0)]))
    with pytest.raises(ConfigError, match="has the head Rated"):
        next(fit_ratings(new_reward_model(Path(body)), rated(4, 0)))
    with pytest.raises(ConfigError, match="knows nothing of margin and flip_rate"):
        config = BradleyTerryConfig(margin=1.0, flip_rate=0.1)
        next(fit_ratings(new_reward_model(body, head=Rated()), rated(4, 0), config))
