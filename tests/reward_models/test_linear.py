"""Linear in words: one optimum, checked by its gradient; saved with its words; and length, which reads nothing."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_env.errors import ConfigError, DataError, RewardError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import measure_comparisons
from rlhf_env.reward_models.linear import LengthReward, LinearReward, fit_linear
from rlhf_env.types import Comparison

HOSTILE = ["", "   ", "\x1b[31m", "🙂🙂", "NULL", "ẞ ß SS", "a" * 10_000]


def pair(better, worse):
    return Comparison("p", (better, worse), (0, 1))


def test_a_score_by_hand():
    """ "the film the": the twice, film once, "the film" and "film the" once each, of which the last has no weight."""
    reward = LinearReward(("film", "the", "the film"), np.array([3.0, -1.0, 0.5]), mean=1.0, std=2.0)
    logit = 3 * math.log(2) - math.log(3) + 0.5 * math.log(2)
    np.testing.assert_allclose(reward.logits(["p"] * 2, ["The FILM the", "nothing"]), [logit, 0])
    np.testing.assert_allclose(reward.score(["p"], ["The FILM the"]), [(logit - 1) / 2])


def test_one_word_that_decides_has_the_weight_of_logistic_regression():
    """Three for it, one against, its count 1, so x = log 2: 4 σ(w x) x − 3 x + λ w = 0 at the optimum."""
    judged = [pair("good", "bad")] * 3 + [pair("bad", "good")]
    reward = fit_linear(judged, longest=1, l2=0.3)
    good, bad = dict(zip(reward.vocabulary, reward.weights, strict=True))["good"], reward.weights[0]
    x = math.log(2)
    slope = 4 / (1 + math.exp(-(good - bad) * x)) * x - 3 * x
    assert slope + 0.3 * good == pytest.approx(0, abs=1e-5)
    assert good == pytest.approx(-bad, abs=1e-6)


def test_the_preferred_leads_by_a_margin_for_each_unit_of_strength():
    """Strength 2 at 0.5 logits each: −x σ(1 − d) + λ w = 0 at the optimum, where d = 2 w x."""
    graded = Comparison("p", ("good", "bad"), (0, 1), strength=2)
    bad, good = fit_linear([graded], longest=1, l2=0.3, least_count=1, margin=0.5).weights
    x = math.log(2)
    assert 0.3 * good == pytest.approx(x / (1 + math.exp(2 * good * x - 1)), abs=1e-5) and good == pytest.approx(-bad)
    plain = fit_linear([pair("good", "bad")], longest=1, l2=0.3, least_count=1).weights
    assert good > plain[1] > 0
    np.testing.assert_array_equal(fit_linear([graded], longest=1, l2=0.3, least_count=1).weights, plain)


def test_a_margin_needs_strengths_and_a_sign():
    with pytest.raises(DataError, match="in units of a comparison's strength, and of these comparisons none has one"):
        fit_linear([pair("good", "bad")], least_count=1, margin=0.5)
    with pytest.raises(ConfigError, match="the margin must be at least 0, it is -1"):
        fit_linear([pair("good", "bad")], least_count=1, margin=-1)


def test_the_gradient_is_zero_where_it_ends_rankings_and_ties_included():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "b", "c", "d"], 5)) for _ in range(60)]
    judged = [Comparison("p", tuple(texts[3 * i : 3 * i + 3]), [(0, 1, 2), (1, 0, 0)][i % 2]) for i in range(20)]
    reward, l2 = fit_linear(judged, longest=1, l2=0.5), 0.5

    def objective(weights):
        logits = LinearReward(reward.vocabulary, weights, 1).logits
        total = 0.0
        for c in judged:
            s = logits([c.prompt] * 3, c.responses)
            d = [(s[i] - s[j], y) for i, j, y in c.pairs]
            costs = [y * math.log1p(math.exp(-x)) + (1 - y) * math.log1p(math.exp(x)) for x, y in d]
            total += sum(costs) / len(costs)
        return total + l2 / 2 * float(weights @ weights)

    for k, sign in itertools.product(range(len(reward.weights)), (-1, 1)):
        step = np.zeros_like(reward.weights)
        step[k] = sign * 1e-3
        assert objective(reward.weights) < objective(reward.weights + step)


def test_what_is_preferred_is_found_and_rare_words_do_not_count():
    rng = np.random.default_rng(0)
    judged = [pair(f"yes {a} unique{i}", f"no {b}") for i, (a, b) in enumerate(rng.choice(list("abc"), (40, 2)))]
    reward = fit_linear(judged)
    assert not any("unique" in g for g in reward.vocabulary)
    assert measure_comparisons(reward, [pair("yes c", "no a"), pair("oh yes", "oh no")])["accuracy"] == 1


def test_whatever_is_scored_has_a_finite_score_of_its_own():
    reward = fit_linear([pair("good 🙂", "bad"), pair("good 🙂", "bad ss")])
    together = reward.score([""] * len(HOSTILE), HOSTILE)
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together, [reward.score([""], [text])[0] for text in HOSTILE])
    assert reward.score([], []).shape == (0,)


def test_it_is_normalised_and_the_same_to_the_bit_in_a_new_process(tmp_path):
    texts = ["good film", "bad film", "good", "a bad, bad film"]
    reward = fit_linear([pair("good film", "bad film"), pair("good", "bad")]).normalized_on([""] * 4, texts)
    scores = reward.score([""] * 4, texts)
    assert scores.mean() == pytest.approx(0) and scores.std() == pytest.approx(1)
    reward.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["reward_kind"] == "linear"
    code = (
        "import sys; from rlhf_env.reward_models import load_reward; r = load_reward(sys.argv[1]); "
        "print(*(x.hex() for x in r.score([''] * 4, sys.argv[2:]).tolist()))"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path, *texts], check=True, capture_output=True, text=True)
    assert told.stdout.split() == [x.hex() for x in scores.tolist()]
    with pytest.raises(RewardError, match="same logit"):
        reward.normalized_on([""] * 2, ["x", "x"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: save_file({"w": np.zeros(2)}, f / "model.safetensors"), "weights of 2 n-grams and nothing else"),
        (lambda f: save_file({"weights": np.zeros(3)}, f / "model.safetensors"), "weights of 2 n-grams"),
        (lambda f: save_file({"weights": np.array([1, np.nan])}, f / "model.safetensors"), "finite"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "vocabulary.json").write_text('{"ngrams": [1, 2]}'), "list of words"),
        (lambda f: (f / "vocabulary.json").write_text("{}"), "list of words"),
        (lambda f: (f / "config.json").write_text('{"reward_kind": "linear"}'), "reward_linear"),
        (
            lambda f: (f / "config.json").write_text('{"reward_kind": "linear", "reward_linear": {"longest": 2}}'),
            "mean",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, spoil, message):
    LinearReward(("a", "b"), np.array([1.0, 2.0])).save_pretrained(tmp_path)
    load_reward(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_reward(str(tmp_path))


def test_a_label_of_it_and_an_unknown_kind_are_refused(tmp_path):
    LinearReward(("a", "b"), np.array([1.0, 2.0])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no labels: leave out 'good'"):
        load_reward(f"{tmp_path}:good")


def test_nothing_to_learn_from():
    with pytest.raises(DataError, match="no comparisons"):
        fit_linear([])
    with pytest.raises(DataError, match="no word occurs in 2 responses"):
        fit_linear([pair("a", "b")])
    with pytest.raises(ConfigError, match="l2 positive"):
        fit_linear([pair("a", "b")], l2=0)


def test_length_prefers_the_longer_or_the_shorter():
    assert LengthReward().score(["", ""], ["abc", ""]).tolist() == [3, 0]
    assert LengthReward(-1).logits(["", ""], ["abc", "🙂"]).tolist() == [-3, -1]


def test_real_comparisons_are_predicted_better_than_by_chance(shared_data):
    """Helpful and harmless dialogues: three in five by words, and shorter responses are a little more harmless."""
    from rlhf_env.preferences.comparisons import read_comparisons
    from rlhf_env.preferences.splits import split_by_prompt

    judged = read_comparisons(shared_data / "preferences" / "hh_harmless_base.jsonl")
    learned, held_out = split_by_prompt(judged, 0.2, 0)
    assert 0.55 < measure_comparisons(fit_linear(learned, longest=1), held_out)["accuracy"] < 0.7
    assert measure_comparisons(LengthReward(-1), judged)["accuracy"] == pytest.approx(0.548, abs=5e-4)


def test_a_longest_ngram_beyond_every_text_costs_no_time():
    """config.json may say anything."""
    assert LinearReward(("good",), np.array([1.0]), longest=10**15).score([""], ["good"]) == pytest.approx(math.log(2))
