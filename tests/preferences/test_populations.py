"""Populations: who is asked what, by weight, and what depends on what."""

import math

import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.preferences.labelers import SimulatedLabeler
from rlhf_env.preferences.populations import Population, drifting
from rlhf_env.settings import LabelerConfig
from rlhf_env.training.prefer import ask
from tests.preferences.binomial import assert_share

N = 20_000
SURE = LabelerConfig(temperature=0.0)


def longer(prompts, responses):
    return [float(len(response)) for response in responses]


def shorter(prompts, responses):
    return [-float(len(response)) for response in responses]


FOR, AGAINST = (SimulatedLabeler(gold, SURE, name=gold.__name__) for gold in (longer, shorter))
NOISY = SimulatedLabeler(longer, LabelerConfig(temperature=1.0), seed=2, name="noisy")


@pytest.mark.parametrize(("weights", "shares"), [((3, 1, 0), (0.75, 0.25, 0.0)), (None, (1 / 3,) * 3)])
def test_each_query_goes_to_one_by_the_weights(weights, shares):
    population = Population([FOR, AGAINST, NOISY], weights)
    members = [population.members(query) for query in range(N)]
    assert {len(those) for those in members} == {1}
    for m, share in enumerate(shares):
        assert_share(members.count([m]), N, share)


def test_of_several_the_next_is_drawn_by_weight_among_those_left():
    population = Population([FOR, AGAINST, NOISY], (3, 2, 1), overlap=2)
    members = [tuple(population.members(query)) for query in range(N)]
    for first, second, p in [(0, 1, 3 / 6 * 2 / 3), (0, 2, 3 / 6 / 3), (1, 0, 2 / 6 * 3 / 4), (2, 1, 1 / 6 * 2 / 5)]:
        assert_share(members.count((first, second)), N, p)


def test_who_is_asked_depends_on_seed_and_query_alone():
    population = Population([FOR, AGAINST, NOISY], overlap=3, seed=4)
    assert all(sorted(population.members(query)) == [0, 1, 2] for query in range(50))
    one = Population([FOR, AGAINST, NOISY], overlap=1, seed=4)
    assert [one.members(query) for query in range(50)] == [population.members(query)[:1] for query in range(50)]
    assert [one.members(q) for q in range(50)] != [Population(one.labelers, seed=5).members(q) for q in range(50)]
    shares = one.shares([7, 3, 9, 3])
    assert sorted(place for _, places in shares for place in places) == [0, 1, 2, 3]
    for labeler, places in shares:
        assert [one.labelers[one.members((7, 3, 9, 3)[place])[0]] for place in places] == [labeler] * len(places)
    assert Population([FOR]).shares([]) == []


def test_what_a_population_says_is_what_its_members_say():
    population = Population([FOR, AGAINST, NOISY], overlap=2, seed=1)
    queries, pairs = list(range(100, 140)), [("a" * (1 + i % 3), "aa") for i in range(40)]
    together = ask(population, ["p"] * 40, pairs, queries, seed=3)
    assert len(together) == 80
    alone = [c for q, pair in zip(queries, pairs, strict=True) for c in ask(population, ["p"], [pair], [q], seed=3)]
    assert alone == together
    for q, pair in zip(queries, pairs, strict=True):
        for m in population.members(q):
            (said,) = ask(population.labelers[m], ["p"], [pair], [q], seed=3)
            assert said in together
    assert [c.responses for c in together[::2]] == [c.responses for c in together[1::2]] == pairs  # in their order


def test_a_query_that_a_member_skips_is_answered_by_the_others():
    picky = SimulatedLabeler(longer, LabelerConfig(temperature=0.0, skip_below=2.5), name="picky")
    found = ask(Population([FOR, picky], overlap=2), ["p", "q"], [("a", "aa"), ("aaa", "a")], [0, 1])
    assert [(c.prompt, c.labeler) for c in found if c.labeler == "longer"] == [("p", "longer"), ("q", "longer")]
    assert [(c.prompt, c.labeler) for c in found if c.labeler == "picky"] == [("q", "picky")]
    assert ask(picky, ["p"], [("a", "aa")], [0]) == []


def test_weights_may_drift_from_one_cluster_to_another():
    drift = drifting((1, 0), (0, 1), over=N)
    assert [drift(q) for q in (0, N // 4, N, 3 * N)] == [[1, 0], [0.75, 0.25], [0, 1], [0, 1]]
    population = Population([FOR, AGAINST], drift)
    early = [population.members(query)[0] for query in range(N // 2)]
    assert population.members(0) == [0] and population.members(2 * N) == [1]
    assert_share(sum(early), N // 2, 0.25)  # the mean; their spread is below that of a binomial


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": 3}, "each query goes to 3 of 2 labelers"),
        ({"overlap": 0}, "each query goes to 0 of 2 labelers"),
        ({"weights": (1,)}, r"2 labelers need as many weights, got shape \[1\]"),
        ({"weights": (1, -1)}, r"must be finite and at least 0.* they are \[1.0, -1.0\]"),
        ({"weights": (0, 0)}, "1 of them above 0, to answer query 0"),
        ({"weights": (1, 0), "overlap": 2}, "2 of them above 0"),
        ({"weights": (1, math.nan)}, "must be finite"),
    ],
)
def test_impossible_populations_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Population([FOR, AGAINST], **arguments)
    with pytest.raises(ConfigError, match="each query goes to 1 of 0 labelers"):
        Population([])


def test_a_drift_of_no_length_is_refused():
    with pytest.raises(ConfigError, match="over at least 1 query between equal numbers"):
        drifting((1, 0), (0, 1), over=0)
    with pytest.raises(ConfigError, match="between equal numbers"):
        drifting((1, 0), (1,), over=5)
