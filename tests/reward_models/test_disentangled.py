"""Two heads, of which only one may know the length."""

import math

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, new_reward_model
from rlhf_env.reward_models.disentangled import correlation, fit_disentangled, length_penalty
from rlhf_env.reward_models.heads import Disentangled
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison
from tests.reward_models.test_bradley_terry import write_body


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return write_body(tmp_path_factory.mktemp("body"))


def judged(count, seed):
    """A + wins, and if both have one or none, the longer response."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        texts = ["".join(rng.choice(list("abc"), rng.integers(2, 20))) for _ in range(2)]
        texts = [text + "+" * int(rng.random() < 0.5) for text in texts]
        worth = [100 * text.endswith("+") + len(text) for text in texts]
        if worth[0] != worth[1]:
            found.append(Comparison("", tuple(texts), (0, 1) if worth[0] > worth[1] else (1, 0)))
    return found


def test_correlation_and_penalty_by_hand():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    assert float(correlation(x, y)) == pytest.approx(0.5) == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    assert float(correlation(x, torch.ones(3))) == 0
    assert float(length_penalty(-x, y, x)) == pytest.approx(1 - 0.5)
    assert float(length_penalty(torch.tensor([1.0, -2.0, 1.0]), 7 * x + 1, x)) == pytest.approx(-1)


def test_the_first_step_costs_what_the_formula_says(body):
    reward = new_reward_model(body, head=Disentangled(), dtype=torch.float64)
    texts = ["good", "bad", "a longer one", "so"]
    q, s = reward.all_logits([""] * 4, texts).T
    lengths = np.array([4, 3, 12, 2])
    both, rho = q + s, lambda x: np.corrcoef(x, lengths)[0, 1]
    ranking = np.mean([math.log1p(math.exp(both[1] - both[0])), math.log1p(math.exp(both[2] - both[3]))])
    w = reward.model.score.weight.detach().numpy()
    cos = abs(w[0] @ w[1]) / np.linalg.norm(w[0]) / np.linalg.norm(w[1])
    said = [Comparison("", ("good", "bad"), (0, 1)), Comparison("", ("a longer one", "so"), (1, 0))]
    row = next(fit_disentangled(reward, said, of_length=0.5, orthogonal=2.0))
    assert row["loss"] == pytest.approx(ranking + 0.5 * (abs(rho(q)) - rho(s)) + 2 * cos)


def test_it_states_probabilities_by_the_sum_that_learned_to_predict():
    first, second = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.25, 2.0]])
    assert Disentangled().log_odds(first, second).item() == -0.75
    assert Disentangled().reduce(first - second).item() == 0.75


def test_quality_knows_less_of_the_length_than_a_plain_reward(body, tmp_path):
    config = BradleyTerryConfig(learning_rate=1e-2, epochs=6, batch_size=32)
    plain, apart = new_reward_model(body), new_reward_model(body, head=Disentangled())
    learned, held_out = judged(200, 0), judged(100, 1)
    list(fit_comparisons(plain, learned, config))
    list(fit_disentangled(apart, learned, config))
    texts = [response for c in held_out for response in c.responses]
    lengths = [len(text) for text in texts]
    known = [abs(np.corrcoef(r.logits([""] * len(texts), texts), lengths)[0, 1]) for r in (plain, apart)]
    assert known[1] < known[0] / 2
    assert measure_comparisons(apart, [Comparison("", ("abcab+", "abcab"), (0, 1))])["accuracy"] == 1
    apart.save_pretrained(tmp_path)
    again = load_reward(str(tmp_path))
    assert again.head == Disentangled()
    np.testing.assert_array_equal(again.score([""] * 4, texts[:4]), apart.score([""] * 4, texts[:4]))


def test_what_does_not_fit_is_refused(body):
    with pytest.raises(ConfigError, match="needs the head Disentangled"):
        next(fit_disentangled(new_reward_model(body), judged(2, 0)))
    with pytest.raises(ConfigError, match="knows nothing of l2"):
        next(fit_disentangled(new_reward_model(body, head=Disentangled()), judged(2, 0), BradleyTerryConfig(l2=1.0)))
