"""Bradley–Terry over players: closed forms, the conditions of a maximum, invariances, coverage of its intervals."""

import math

import numpy as np
import pytest

from rlhf_env.errors import DataError
from rlhf_env.preferences.arena import borda, bradley_terry, win_rates
from rlhf_env.records.jsonl import read_jsonl


def some_games(seed, players=4, games=400, covariates=0):
    """first, second, preference (wins, losses and ties), covariates, of random players."""
    draw = np.random.default_rng(seed)
    first = draw.integers(players, size=games)
    second = (first + draw.integers(1, players, size=games)) % players
    x = draw.normal(size=(games, covariates))
    p = 1 / (1 + np.exp(-(0.5 * (first - second) + x.sum(1))))
    y = np.where(draw.random(games) < 0.1, 0.5, draw.random(games) < p)
    return first, second, y, x


def log_likelihood(strength, effects, first, second, y, x):
    """Σ y log σ(d) + (1 − y) log σ(−d), one comparison after another."""
    total = 0.0
    for a, b, won, row in zip(first, second, y, x, strict=True):
        d = strength[a] - strength[b] + sum(e * v for e, v in zip(effects, row, strict=True))
        total += won * -math.log1p(math.exp(-d)) + (1 - won) * -math.log1p(math.exp(d))
    return total


# --- closed forms ----------------------------------------------------------------------------------


def test_two_players_are_the_log_odds_of_their_games():
    found = bradley_terry(["ann"] * 40, ["ben"] * 40, [1.0] * 30 + [0.0] * 10)
    lead, low, high = found.lead("ann", "ben")
    assert lead == pytest.approx(math.log(3))
    # The robust variance is 1/(M p (1 − p)) · M/(M − 1), which is 1/(39 · 3/16); M = 40 has the normal quantile.
    assert (high - low) / 2 == pytest.approx(1.959964 / math.sqrt(39 * 3 / 16))
    assert found.log_likelihood == pytest.approx(30 * math.log(0.75) + 10 * math.log(0.25))
    assert found.strength.sum() == pytest.approx(0)


def test_few_clusters_have_students_quantile():
    found = bradley_terry(["a"] * 4, ["b"] * 4, [1, 1, 1, 0])
    lead, low, _ = found.lead("a", "b")
    assert lead - low == pytest.approx(3.182446 * math.sqrt(1 / (3 * 3 / 16)))  # three degrees of freedom


def test_odds_of_ten_are_400_elo_points_around_1000():
    rows = bradley_terry(["weak", "weak"] * 11, ["strong", "strong"] * 11, [0] * 20 + [1, 1]).rows()
    assert [row["player"] for row in rows] == ["strong", "weak"]
    assert rows[0]["elo"] - rows[1]["elo"] == pytest.approx(400)
    assert rows[0]["elo"] + rows[1]["elo"] == pytest.approx(2000)
    assert rows[0]["elo_low"] < rows[0]["elo"] < rows[0]["elo_high"]


def test_three_players_whose_games_are_as_their_strengths_say():
    # Strengths log 4, log 2, log 1 predict 4 of 6, 4 of 5 and 2 of 3 games won; 30 games each make them exact.
    wins = {("a", "b"): 20, ("a", "c"): 24, ("b", "c"): 20}
    games = [(*pair, float(k < won)) for pair, won in wins.items() for k in range(30)]
    found = bradley_terry(*zip(*games, strict=True))  # type: ignore[misc]
    np.testing.assert_allclose(np.exp(found.strength - found.strength[2]), [4, 2, 1], atol=1e-8)


def test_a_tie_is_half_a_win_for_each():
    decided = bradley_terry(["a"] * 10, ["b"] * 10, [1] * 7 + [0] * 3)
    tied = bradley_terry(["a"] * 10, ["b"] * 10, [1] * 4 + [0.5] * 6)
    np.testing.assert_allclose(tied.strength, decided.strength, atol=1e-9)
    assert tied.covariance[0, 0] < decided.covariance[0, 0]  # the same points, less noise


# --- the maximum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_at_the_maximum_the_gradient_is_zero(ridge):
    first, second, y, x = some_games(0, covariates=2)
    found = bradley_terry(first, second, y, covariates=x, ridge=ridge)

    def objective(theta):
        return log_likelihood(theta[:4], theta[4:], first, second, y, x) - 0.5 * ridge * float(theta @ theta)

    theta = np.concatenate([found.strength, found.effects])
    for k in range(len(theta)):
        step = 1e-5 * np.eye(len(theta))[k]
        assert (objective(theta + step) - objective(theta - step)) / 2e-5 == pytest.approx(0, abs=1e-5)
        assert objective(theta + 1e3 * step) < objective(theta)
    assert found.log_likelihood == pytest.approx(log_likelihood(theta[:4], theta[4:], first, second, y, x))


def test_everyone_wins_as_many_points_as_expected():
    first, second, y, _ = some_games(1)
    found = bradley_terry(first, second, y)
    p = 1 / (1 + np.exp(found.strength[second] - found.strength[first]))
    for k in range(4):
        won = y[first == k].sum() + (1 - y[second == k]).sum()
        assert p[first == k].sum() + (1 - p[second == k]).sum() == pytest.approx(won, abs=1e-6)


def test_names_and_sides_do_not_matter():
    first, second, y, x = some_games(2, covariates=1)
    found = bradley_terry(first, second, y, covariates=x)
    names = np.array(["d", "b", "a", "c"])
    swapped = np.arange(len(y)) % 2 == 0
    sides = np.where(swapped, second, first), np.where(swapped, first, second)
    signed = np.where(swapped[:, None], -x, x)
    again = bradley_terry(*(names[side].tolist() for side in sides), np.where(swapped, 1 - y, y), covariates=signed)
    order = [again.players.index(name) for name in names]
    np.testing.assert_allclose(again.strength[order], found.strength, atol=1e-8)
    np.testing.assert_allclose(again.effects, found.effects, atol=1e-8)
    np.testing.assert_allclose(again.covariance[np.ix_([*order, 4], [*order, 4])], found.covariance, atol=1e-8)


# --- covariates ------------------------------------------------------------------------------------


def styled(longer, shorter):
    """Games of a and b in which the longer one wins 3 of 4, whoever it is: a in `longer` of them (multiples of 4)."""
    x = np.repeat([1.0, -1.0], [longer, shorter])
    y = np.concatenate([np.resize([1, 1, 1, 0], longer), np.resize([0, 0, 0, 1], shorter)])
    return ["a"] * len(y), ["b"] * len(y), y, x[:, None]


def test_a_covariate_that_explains_everything_leaves_the_players_equal():
    first, second, y, x = styled(longer=320, shorter=80)
    assert bradley_terry(first, second, y).lead("a", "b")[0] > 0.5
    controlled = bradley_terry(first, second, y, covariates=x)
    np.testing.assert_allclose(controlled.strength, 0, atol=1e-8)
    np.testing.assert_allclose(controlled.effects, math.log(3), atol=1e-8)


def test_a_covariate_of_ones_is_the_advantage_of_being_shown_first():
    # a wins 30 of 40 as the first, and 20 of 40 as the second: log-odds log 3 = lead + advantage, 0 = lead − advantage.
    first, second = ["a"] * 40 + ["b"] * 40, ["b"] * 40 + ["a"] * 40
    y = [1.0] * 30 + [0.0] * 10 + [1.0] * 20 + [0.0] * 20
    found = bradley_terry(first, second, y, covariates=np.ones((80, 1)))
    assert found.lead("a", "b")[0] == pytest.approx(math.log(3) / 2)
    assert found.effects[0] == pytest.approx(math.log(3) / 2)


def test_the_unit_of_a_covariate_does_not_matter():
    first, second, y, x = some_games(3, covariates=1)
    one, thousand = (bradley_terry(first, second, y, covariates=unit * x) for unit in (1, 1000))
    np.testing.assert_allclose(thousand.strength, one.strength, atol=1e-8)
    np.testing.assert_allclose(1000 * thousand.effects, one.effects, atol=1e-8)


# --- intervals -------------------------------------------------------------------------------------


def test_the_covariance_is_the_sandwich():
    first, second, y, x = some_games(4, covariates=1)
    found = bradley_terry(first, second, y, covariates=x)
    # In the gauge where player 0 has strength 0, from one comparison after another.
    bread, meat = np.zeros((4, 4)), np.zeros((4, 4))
    for a, b, won, row in zip(first, second, y, x, strict=True):
        v = np.concatenate([(np.eye(4)[a] - np.eye(4)[b])[1:], row])
        p = 1 / (1 + math.exp(found.strength[b] - found.strength[a] - float(found.effects @ row)))
        bread += p * (1 - p) * np.outer(v, v)
        meat += (won - p) ** 2 * np.outer(v, v)
    expected = np.linalg.inv(bread) @ meat @ np.linalg.inv(bread) * len(y) / (len(y) - 1)
    to_gauge = np.column_stack([-np.ones(4), np.eye(4)])  # strengths less that of player 0; effects as they are
    to_gauge[3, 0] = 0
    np.testing.assert_allclose(to_gauge @ found.covariance @ to_gauge.T, expected, atol=1e-10)


def test_a_cluster_counts_once_however_often_it_is_repeated():
    first, second, y, _ = some_games(5)
    once = bradley_terry(first, second, y)
    thrice = [np.tile(values, 3) for values in (first, second, y)]
    clustered = bradley_terry(*thrice, clusters=np.tile(np.arange(len(y)), 3))
    np.testing.assert_allclose(clustered.covariance, once.covariance, atol=1e-10)
    assert clustered.clusters == len(y)
    assert bradley_terry(*thrice).covariance[0, 0] < 0.4 * once.covariance[0, 0]  # as if three times as much were known


def covered(simulate, contrast, truth, repetitions):
    """In how many of the repetitions the interval contains the truth."""
    inside = 0
    for seed in range(repetitions):
        _, low, high = simulate(np.random.default_rng([seed, 99])).interval(contrast)
        inside += low <= truth <= high
    return inside


@pytest.mark.slow
def test_intervals_contain_the_truth_nineteen_times_of_twenty():
    strength, effect, repetitions = np.array([0.6, 0.1, -0.2, -0.5]), 0.4, 1000

    def simulate(draw):
        first = draw.integers(4, size=500)
        second = (first + draw.integers(1, 4, size=500)) % 4
        x = draw.normal(size=500)
        p = 1 / (1 + np.exp(-(strength[first] - strength[second] + effect * x)))
        return bradley_terry(first, second, (draw.random(500) < p) * 1.0, covariates=x[:, None])

    error = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    for contrast, truth in (([1, -1, 0, 0, 0], 0.5), ([1, 0, 0, 0, 0], 0.6), ([0, 0, 0, 0, 1], effect)):
        assert covered(simulate, contrast, truth, repetitions) / repetitions == pytest.approx(0.95, abs=error)


@pytest.mark.slow
def test_intervals_by_annotator_hold_where_those_by_comparison_do_not():
    # Annotators differ in which of two they like: half of them by +1, half by −1, so the mean lead is 0.
    repetitions = 500

    def simulate(draw, clustered):
        annotator = np.repeat(np.arange(40), 20)
        p = 1 / (1 + np.exp(-draw.choice([-1.0, 1.0], size=40)))[annotator]
        y = (draw.random(800) < p) * 1.0
        return bradley_terry([0] * 800, [1] * 800, y, clusters=annotator if clustered else None)

    by_annotator = covered(lambda draw: simulate(draw, True), [1, -1], 0.0, repetitions) / repetitions
    by_comparison = covered(lambda draw: simulate(draw, False), [1, -1], 0.0, repetitions) / repetitions
    assert by_annotator == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repetitions))
    assert by_comparison < 0.8


# --- where there is no maximum ---------------------------------------------------------------------


def test_who_never_lost_is_named():
    with pytest.raises(DataError, match=r"'a' never lost a point to 'b', 'c'.*ridge"):
        bradley_terry(["a", "a", "b", "c"], ["b", "c", "c", "b"], [1, 1, 1, 1])


def test_who_never_won_is_named():
    with pytest.raises(DataError, match=r"'a', 'b' never lost a point to 'c'"):
        bradley_terry(["a", "b", "b", "c"], ["b", "a", "c", "a"], [1, 1, 1, 0])


def test_a_circle_of_wins_is_enough():
    found = bradley_terry(["a", "b", "c"], ["b", "c", "a"], [1, 1, 1])
    np.testing.assert_allclose(found.strength, 0, atol=1e-9)


def test_players_who_never_met_have_no_common_scale():
    with pytest.raises(DataError, match=r"'c', 'd' and the others were never compared"):
        bradley_terry(["a", "c"], ["b", "d"], [0.5, 0.5])


def test_a_prior_makes_the_undefeated_finite():
    # One game: s_a = −s_b = s, and the gradient 1 − σ(2s) = λ s.
    found = bradley_terry(["a", "a"], ["b", "b"], [1, 1], ridge=0.5)
    s = found.strength[0]
    assert 2 * (1 - 1 / (1 + math.exp(-2 * s))) == pytest.approx(0.5 * s)


def test_a_covariate_that_tells_every_outcome_is_refused():
    first, second, _, x = some_games(6, covariates=1)
    with pytest.raises(DataError, match="a covariate, with the players, tells all outcomes"):
        bradley_terry(first, second, (x[:, 0] > 0) * 1.0, covariates=x)


def test_a_covariate_that_is_a_player_is_refused():
    first, second, y, x = some_games(7, covariates=1)
    of_player = np.eye(4)[first][:, [2]] - np.eye(4)[second][:, [2]]
    with pytest.raises(DataError, match="covariate 1 is a combination of the players"):
        bradley_terry(first, second, y, covariates=np.column_stack([x, of_player]))


@pytest.mark.parametrize(
    ("games", "settings", "message"),
    [
        ((["a"], ["b"], [1.0, 0.0]), {}, "as long as each other"),
        (([], [], []), {}, "not empty"),
        ((["a", "b"], ["b", "b"], [1, 0]), {}, "comparison 1 is of 'b' with itself"),
        ((["a", "b"], ["b", "a"], [1, 2]), {}, "comparison 1: a preference is a number from 0 to 1, it is 2"),
        ((["a", "b"], ["b", "a"], [np.nan, 1]), {}, "comparison 0: a preference is a number from 0 to 1, it is nan"),
        ((["a", "b"], ["b", "a"], [1, 1]), {"covariates": [[1.0]]}, r"finite numbers \[2, F\]"),
        ((["a", "b"], ["b", "a"], [1, 1]), {"clusters": [0, 0]}, "at least two groups"),
        ((["a", "b"], ["b", "a"], [1, 1]), {"clusters": [0, 1, 2]}, "one name for each"),
        ((["a", "b"], ["b", "a"], [1, 1]), {"ridge": -1.0}, "at least 0"),
    ],
)
def test_what_cannot_be_used_is_refused(games, settings, message):
    with pytest.raises(DataError, match=message):
        bradley_terry(*games, **settings)


# --- Borda -----------------------------------------------------------------------------------------


def test_win_rates_and_bordas_count_by_hand():
    games = (["a", "a", "b", "c"], ["b", "b", "c", "a"], [1, 0.5, 1, 1])
    players, rates = win_rates(*games)
    assert players == ("a", "b", "c")
    np.testing.assert_array_equal(rates, [[np.nan, 0.75, 0], [0.25, np.nan, 1], [1, 0, np.nan]])
    assert borda(*games) == pytest.approx({"b": 0.625, "c": 0.5, "a": 0.375})
    assert list(borda(*games)) == ["b", "c", "a"]


def test_borda_needs_everyone_to_have_met():
    with pytest.raises(DataError, match="'a' never met 'c'"):
        borda(["a", "b"], ["b", "c"], [1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_where_all_met_equally_often_bradley_terry_ranks_by_borda(seed):
    # Preferences that no strengths explain: any probabilities, each pair once.
    rates = np.random.default_rng(seed).uniform(0.05, 0.95, size=(6, 6))
    first, second = np.triu_indices(6, k=1)
    games = (first, second, rates[first, second])
    assert [row["player"] for row in bradley_terry(*games).rows()] == list(borda(*games))


# --- real people -----------------------------------------------------------------------------------


def test_tulus_policies_are_ranked_by_its_labelers(shared_data):
    rows = read_jsonl(shared_data / "preferences" / "tulu_human_eval.jsonl")
    games = ([row["model_a"] for row in rows], [row["model_b"] for row in rows])
    y = np.array([0.5 + 0.5 * np.sign(row["preference"]) for row in rows])
    longer = np.array([[math.log1p(len(row["response_a"])) - math.log1p(len(row["response_b"]))] for row in rows])
    labelers = [row["labeller"] for row in rows]
    alone, together = bradley_terry(*games, y), bradley_terry(*games, y, clusters=labelers)
    assert len(alone.players) == 4 and together.clusters == 16
    np.testing.assert_allclose(alone.strength, together.strength)
    controlled = bradley_terry(*games, y, covariates=longer, clusters=labelers)
    assert controlled.log_likelihood > alone.log_likelihood
    turned = bradley_terry(*games, 1 - y)
    np.testing.assert_allclose(turned.strength, -alone.strength, atol=1e-8)
