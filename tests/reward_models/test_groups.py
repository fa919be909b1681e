"""Two groups that want opposite things: who belongs where is found, and nobody's wish is averaged away."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_env.errors import ConfigError, DataError, RewardError
from rlhf_env.reward_models import load_reward
from rlhf_env.reward_models.bradley_terry import new_reward_model
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.groups import annotators, fit_annotators, fit_mixture, responsibilities
from rlhf_env.reward_models.heads import Disentangled, Groups, MeanVariance
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.types import Comparison
from tests.reward_models.test_bradley_terry import write_body

TWO = Groups(("a", "b"), (0.5, 0.5))
FAST = BradleyTerryConfig(learning_rate=1e-2, epochs=3, batch_size=16)
PEOPLE = {f"plus {i}": "+" for i in range(4)} | {f"minus {i}": "-" for i in range(3)}


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return write_body(tmp_path_factory.mktemp("body"))


def judged(each=12):
    """Everybody judges their own pairs of noise with a + or a −; one judgement in six is not what they want."""
    found = []
    for k, (name, wanted) in enumerate(PEOPLE.items()):
        rng = np.random.default_rng(k)
        for i, x in enumerate("".join(letters) for letters in rng.choice(list("abcd"), (each, 10))):
            better, worse = (wanted, "+" if wanted == "-" else "-") if i % 6 else ("=", "*")
            found.append(Comparison("p ", (x[:5] + better, x[5:] + worse), (0, 1), labeler=name))
    return found


def test_the_e_step_by_hand():
    """Shares ¾ and ¼; the first said what is as likely under both, the second what is nine times as likely under b."""
    found, said = responsibilities(torch.tensor([[0.1, 0.1], [0.1, 0.9]]).log(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    torch.testing.assert_close(said.exp(), torch.tensor([0.1, 0.075 + 0.225]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mixture_finds_the_groups(body, seed):
    reward = new_reward_model(body, head=TWO, seed=seed)
    *_, last = fit_mixture(reward, judged(), FAST, rounds=4, seed=seed)
    group = dict(zip(last.labelers, last.posterior.argmax(1), strict=True))
    sides = {wanted: {group[name] for name, w in PEOPLE.items() if w == wanted} for wanted in "+-"}
    assert sides["+"] != sides["-"] and len(sides["+"]) == len(sides["-"]) == 1
    assert sorted(last.weights) == pytest.approx([3 / 7, 4 / 7], abs=0.05)
    assert reward.head.weights == pytest.approx(tuple(last.weights))
    plus, minus = reward.all_logits(["p "] * 2, ["abcab+", "abcab-"])
    lead = (plus - minus)[[min(sides["+"]), min(sides["-"])]]
    assert lead[0] > 0 > lead[1]


def test_each_labeler_has_a_logit_of_their_own(body):
    comparisons = judged()
    reward = new_reward_model(body, head=annotators(comparisons))
    rows = list(fit_annotators(reward, comparisons, BradleyTerryConfig(learning_rate=1e-2, epochs=10, batch_size=16)))
    assert rows[-1]["loss"] < rows[0]["loss"]
    plus, minus = reward.all_logits(["p "] * 2, ["abcab+", "abcab-"])
    wants = dict(zip(reward.head.names, np.sign(plus - minus), strict=True))
    assert wants == {name: 1 if wanted == "+" else -1 for name, wanted in PEOPLE.items()}


def test_one_step_costs_each_group_what_belongs_to_it(body):
    reward = new_reward_model(body, head=Groups(("ann", "ben"), (0.5, 0.5)), dtype=torch.float64)
    logits = reward.all_logits(["p "] * 2, ["good", "bad"])
    said = {"ann": (0, 1), "ben": (1, 0)}
    row = next(fit_annotators(reward, [Comparison("p ", ("good", "bad"), r, labeler=name) for name, r in said.items()]))
    (a, b), (c, d) = logits[:, 0], logits[:, 1]
    assert row["loss"] == pytest.approx((math.log1p(math.exp(b - a)) + math.log1p(math.exp(c - d))) / 2)


def test_the_least_and_the_mean_by_hand():
    logits = torch.tensor([[1.0, 30.0], [5.0, 10.0]], dtype=torch.float64)
    scaled = {"means": (1.0, 20.0), "stds": (2.0, 10.0)}  # (0, 1), (2, −1)
    torch.testing.assert_close(Groups(("a", "b"), (0.75, 0.25), **scaled).reduce(logits).tolist(), [0.0, -1.0])
    mean = Groups(("a", "b"), (0.75, 0.25), "mean", **scaled).reduce(logits)
    torch.testing.assert_close(mean.tolist(), [0.25, 1.25])


def test_groups_are_compared_on_one_scale_saved_and_the_same_in_a_new_process(body, tmp_path):
    texts = ["good", "a bad one", "", "so so, but the music"]
    reward = new_reward_model(body, head=TWO)
    reward.normalize_on(["p "] * 4, texts)
    each = reward.all_logits(["p "] * 4, texts)
    scaled = (each - each.mean(0)) / each.std(0)
    least = scaled.min(1)
    np.testing.assert_allclose(reward.score(["p "] * 4, texts), (least - least.mean()) / least.std(), atol=1e-9)
    reward.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told["reward_kind"], told["id2label"]) == ("groups", {"0": "a", "1": "b"})
    code = (
        "import sys; from rlhf_env.reward_models import load_reward; r = load_reward(sys.argv[1]); "
        "print(*(x.hex() for x in r.score(['p '] * 4, sys.argv[2:]).tolist()))"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path, *texts], check=True, capture_output=True, text=True)
    assert said.stdout.split() == [x.hex() for x in reward.score(["p "] * 4, texts).tolist()]


def test_one_group_alone_in_its_own_unit_and_nothing_is_lost_by_saving_it(body, tmp_path):
    texts = ["good", "a bad one", "", "so so, but the music"]
    reward = new_reward_model(body, head=Groups(("ann", "user:7"), (0.5, 0.5)))
    each = reward.all_logits(["p "] * 4, texts)
    reward.save_pretrained(tmp_path / "raw")
    np.testing.assert_allclose(load_reward(f"{tmp_path / 'raw'}:ann").score(["p "] * 4, texts), each[:, 0], rtol=1e-12)
    reward.normalize_on(["p "] * 4, texts)
    reward.save_pretrained(tmp_path / "all")
    for number, name in enumerate(reward.head.names):
        alone = load_reward(f"{tmp_path / 'all'}:{name}")
        column = each[:, number]
        np.testing.assert_allclose(alone.score(["p "] * 4, texts), (column - column.mean()) / column.std(), atol=1e-9)
        alone.save_pretrained(tmp_path / "again")
        again = load_reward(str(tmp_path / "again"))
        np.testing.assert_allclose(again.score(["p "] * 4, texts), reward.score(["p "] * 4, texts), rtol=1e-12)
        mean, std = alone.normalize_on(["p "] * 3, texts[:3])
        assert (mean, std) == (alone.mean, alone.std) == pytest.approx((column[:3].mean(), column[:3].std()))
    with pytest.raises(ConfigError, match="ben"):
        load_reward(f"{tmp_path / 'all'}:ben")


def test_the_probability_that_groups_state_is_that_of_somebody_drawn_by_weight():
    """¾ σ(log 3) + ¼ σ(−log 4) = ¾ · ¾ + ¼ · 1/5 = 0.6125, whatever unit the groups are compared in."""
    first, second = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(4)]])
    odds = Groups(("a", "b"), (0.75, 0.25), means=(1.0, 2.0), stds=(3.0, 4.0)).log_odds(first, second)
    assert odds.sigmoid().item() == pytest.approx(0.6125)
    alone = Groups(("a", "b"), (1.0, 0.0)).log_odds(first, second)
    assert alone.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("head", [TWO, MeanVariance(risk=1.0), Disentangled()], ids=lambda head: type(head).__name__)
def test_a_score_depends_on_no_batch_mate_and_no_padding(tmp_path, family, head):
    texts = ["good", "", "a much longer response than the others are", "x"]
    reward = new_reward_model(write_body(tmp_path, family), head=head, dtype=torch.float64)
    together = reward.score([""] * 4, texts)
    np.testing.assert_allclose(together, [reward.score([""], [text])[0] for text in texts], rtol=1e-12)
    assert len(set(together.round(9))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_kind": "oracle"}, "of the reward_kind 'oracle'; known are label, mean_variance"),
        ({"reward_head": {"names": ["a", "b"]}}, "weights"),
        ({"reward_head": {"names": ["a", "b"], "weights": [0.5, 0.6]}}, "in sum 1"),
        ({"reward_head": {"names": ["a", "b", "c"], "weights": [0.5, 0.25, 0.25]}}, "3 logits, the model 2"),
        ({"reward_head": {"names": ["a", "b"], "weights": [0.5, 0.5], "aggregate": "max"}}, "aggregate"),
        ({"reward_head": 3}, "holds the settings of groups; it is 3"),
    ],
)
def test_a_head_that_is_unknown_or_does_not_fit_is_refused(body, tmp_path, change, message):
    new_reward_model(body, head=TWO).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | change))
    with pytest.raises(ConfigError, match=message):
        load_reward(str(tmp_path))


@pytest.mark.parametrize(
    "settings", [{"names": ("a", "a")}, {"names": ("a",)}, {"weights": (1.0,)}, {"stds": (0.0, 1.0)}]
)
def test_what_are_no_groups(settings):
    with pytest.raises(ConfigError):
        Groups(**({"names": ("a", "b"), "weights": (0.5, 0.5)} | settings))


def test_what_groups_cannot_learn_from(body):
    with pytest.raises(DataError, match="say who judged"):
        annotators([Comparison("p", ("a", "b"), (0, 1))])
    reward = new_reward_model(body, head=TWO)
    with pytest.raises(DataError, match="no logit for 'plus 0'"):
        next(fit_annotators(reward, judged()[:3]))
    ann = [replace(c, labeler="a") for c in judged()[:3]]
    with pytest.raises(DataError, match="nothing is learned from 'b'"):  # whose untrained logit could be the least
        next(fit_annotators(reward, ann))
    with pytest.raises(ConfigError, match="groups knows nothing of ties: leave"):
        next(fit_mixture(reward, judged()[:3], BradleyTerryConfig(ties="davidson")))
    with pytest.raises(ConfigError, match="has the head Groups"):
        next(fit_mixture(new_reward_model(body), judged()[:3]))
    with pytest.raises(RewardError, match="a, b score all responses alike"):
        with torch.no_grad():
            reward.model.score.weight.zero_()
        reward.normalize_on(["p"] * 2, ["good", "bad"])


def test_labelers_who_cannot_be_told_apart_make_no_mixture(body):
    """Of whom judged once, nothing is left to ask; and a group without people would score by an untrained logit."""
    one = [replace(c, labeler="ann") for c in judged()]
    once = [replace(c, labeler=f"{i}") for i, c in enumerate(judged())]
    for those, message in (
        ([replace(c, labeler="") for c in one], "say who judged"),
        (one, "2 groups are found among at least 2 labelers who judged twice; these are 1"),
        (once, "these are 0"),
    ):
        with pytest.raises(DataError, match=message):
            next(fit_mixture(new_reward_model(body, head=TWO), those, FAST))


def test_a_group_that_nobody_is_left_in_is_an_error(body, monkeypatch):
    """Everything that anybody says is likelier under the first group."""
    monkeypatch.setattr(
        "rlhf_env.reward_models.groups._costs", lambda reward, those, config: np.tile([0.0, 9.0], (len(those), 1))
    )
    with pytest.raises(DataError, match="after round 1 no labeler is left in the group b"):
        next(fit_mixture(new_reward_model(body, head=TWO), judged(), replace(FAST, epochs=1)))


def test_whoever_judged_once_starts_in_no_group(body, monkeypatch):
    """They are learned from by both alike; those who can be asked are split in two halves."""
    begun = []

    def learn(reward, comparisons, belongs, config, seed):
        begun.append({c.labeler: tuple(row) for c, row in zip(comparisons, belongs, strict=True)})
        return iter(())

    monkeypatch.setattr("rlhf_env.reward_models.groups._fit_weighted", learn)
    guests = [replace(c, labeler=f"guest {i}") for i, c in enumerate(judged(2)[:6])]
    next(fit_mixture(new_reward_model(body, head=TWO), judged() + guests, FAST, rounds=2))
    shares = begun[1]
    assert {share for name, share in shares.items() if name.startswith("guest")} <= {(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)}
    asked = [share for name, share in shares.items() if not name.startswith("guest")]
    assert set(asked) == {(1.0, 0.0), (0.0, 1.0)}
    assert any(share == (0.5, 0.5) for share in shares.values())


def test_a_body_that_had_groups_starts_anew(body, tmp_path):
    new_reward_model(body, head=TWO).save_pretrained(tmp_path)
    assert new_reward_model(tmp_path).head is None
    assert isinstance(load_reward(str(tmp_path)), ClassifierReward)
