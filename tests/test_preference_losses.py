"""Losses of judgements: numbers worked by hand, equivalences with Bradley–Terry, and gradients by differences."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_env.errors import DataError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.preference_losses import (
    best_loss,
    centering_penalty,
    davidson,
    less_margin,
    outcome_loss,
    plackett_luce_loss,
    probit_loss,
    rao_kupper,
    smoothed,
    unflipped,
)

LN2, LN3 = math.log(2), math.log(3)
SCORES = st.floats(-20, 20)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found.flatten(), f64(*expected), rtol=1e-12, atol=1e-12)


# --- rankings of K ---------------------------------------------------------------------------------


def test_a_ranking_of_three_by_hand() -> None:
    """Odds 4 : 2 : 1. In this order: 4/7 · 2/3; turned over: 1/7 · 2/6."""
    odds = f64(4, 2, 1).log()
    close(plackett_luce_loss(odds, (0, 1, 2)), -math.log(4 / 7 * 2 / 3))
    close(plackett_luce_loss(odds, (2, 1, 0)), -math.log(1 / 7 * 2 / 6))


def test_a_ranking_with_ties_by_hand() -> None:
    """Odds 4 : 2 : 1. The first two tied leave two orders; the last two tied, two; all three, six."""

    def order(*odds: int) -> float:
        return -sum(math.log(odds[k] / sum(odds[k:])) for k in range(len(odds)))

    odds = f64(4, 2, 1).log()
    close(plackett_luce_loss(odds, (0, 0, 1)), (order(4, 2, 1) + order(2, 4, 1)) / 2)
    close(plackett_luce_loss(odds, (0, 1, 1)), (order(4, 2, 1) + order(4, 1, 2)) / 2)
    close(plackett_luce_loss(odds, (0, 0, 0)), sum(order(*each) for each in permutations((4, 2, 1))) / 6)


def test_the_probabilities_of_all_rankings_sum_to_one() -> None:
    scores = f64(0.3, -1.0, 2.0, 0.7)
    total = sum(float(torch.exp(-plackett_luce_loss(scores, ranks))) for ranks in permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-12)


@given(first=SCORES, second=SCORES)
@pytest.mark.parametrize(("ranks", "preference"), [((0, 1), 1.0), ((1, 0), 0.0), ((0, 0), 0.5)])
def test_a_ranking_of_two_and_the_best_of_two_are_bradley_terry(first, second, ranks, preference) -> None:
    scores = f64(first, second)
    expected = float(bradley_terry_loss(scores[0] - scores[1], torch.tensor(preference)))
    close(plackett_luce_loss(scores, ranks), expected)
    close(best_loss(scores, ranks), expected)


def test_the_best_of_four_by_hand() -> None:
    odds = f64(4, 2, 1, 1).log()
    close(best_loss(odds, (1, 0, 2, 3)), math.log(4))
    close(best_loss(odds, (0, 0, 1, 1)), (math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("loss", [plackett_luce_loss, best_loss])
@pytest.mark.parametrize("ranks", [(2, 0, 1, 3), (1, 0, 0, 2), (0, 0, 0, 0)])
def test_rankings_know_no_constant_and_no_order_of_presentation(loss, ranks) -> None:
    scores = f64(0.3, -1.0, 2.0, 0.7)
    torch.testing.assert_close(loss(scores + 5, ranks), loss(scores, ranks), rtol=1e-12, atol=0)
    turned = [3, 1, 0, 2]
    torch.testing.assert_close(loss(scores[turned], [ranks[i] for i in turned]), loss(scores, ranks))
    assert torch.autograd.gradcheck(lambda x: loss(x, ranks), scores.requires_grad_())


@pytest.mark.parametrize("loss", [plackett_luce_loss, best_loss])
def test_equals_that_are_tied_stay_as_they_are(loss) -> None:
    scores = f64(1.5, 1.5, 1.5).requires_grad_()
    loss(scores, (0, 0, 0)).backward()
    close(scores.grad, 0, 0, 0)


def test_scores_far_apart_are_no_trouble() -> None:
    scores = f64(1000, 0, -1000).requires_grad_()
    loss = plackett_luce_loss(scores, (2, 1, 0))
    close(loss.detach(), 3000)
    loss.backward()
    close(scores.grad, 2, -1, -1)


def test_too_many_ties_are_refused() -> None:
    plackett_luce_loss(torch.zeros(10), (0,) * 10)
    with pytest.raises(DataError, match="11 responses of a ranking are tied; .* at most 10"):
        plackett_luce_loss(torch.zeros(12), (0,) * 11 + (1,))


# --- ties as a third outcome -----------------------------------------------------------------------


def test_davidson_by_hand() -> None:
    """Odds 4 : 1, so 2 : ν : ½ with ν = 1½."""
    close(davidson(f64(math.log(4)), 1.5).exp(), 0.5, 0.375, 0.125)


def test_rao_and_kupper_by_hand() -> None:
    """Odds 4 : 1, θ = 2: 4/(4 + 2), 1/(1 + 8), and a tie with what is left, 1 − 2/3 − 1/9."""
    close(rao_kupper(f64(math.log(4)), 2.0).exp(), 2 / 3, 2 / 9, 1 / 9)


@given(d=st.floats(-30, 30), parameter=st.floats(0, 5))
def test_the_three_outcomes_sum_to_one_and_turn_with_the_order(d, parameter) -> None:
    for log_probs in (lambda x: davidson(x, parameter), lambda x: rao_kupper(x, 1 + parameter)):
        found = log_probs(f64(d))
        close(found.exp().sum(), 1)
        torch.testing.assert_close(found.flip(-1), log_probs(f64(-d)), rtol=1e-12, atol=1e-12)


@given(d=st.floats(-30, 30))
def test_without_ties_both_are_bradley_terry(d) -> None:
    for found in (davidson(f64(d), 0.0), rao_kupper(f64(d), 1.0)):
        for preference in (1.0, 0.0, 0.3):
            close(outcome_loss(found, f64(preference)), float(bradley_terry_loss(f64(d), f64(preference))))


def test_what_was_said_counts_a_tie_or_a_win_or_a_probability() -> None:
    found = davidson(torch.full((4,), math.log(4), dtype=torch.float64), 1.5)
    loss = outcome_loss(found, f64(1, 0.5, 0, 0.25))
    close(loss, LN2, -math.log(0.375), math.log(8), 0.25 * LN2 + 0.75 * math.log(8))


@pytest.mark.parametrize("log_probs", [davidson, rao_kupper])
def test_gradients_of_ties_by_differences_and_none_between_equals(log_probs) -> None:
    d, parameter = f64(0.7, -2.0, 0.0).requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    y = f64(1, 0.5, 0.5)
    assert torch.autograd.gradcheck(lambda d, p: outcome_loss(log_probs(d, p), y), (d, parameter))
    outcome_loss(log_probs(d, parameter), y).sum().backward()
    assert d.grad is not None and d.grad[2] == 0 and d.grad[1] < 0  # the tied are pulled together, up from −2


@pytest.mark.parametrize("excess", [1e-3, 1e-7, 1e-12])
def test_ties_so_rare_that_float32_has_no_number_for_them(excess) -> None:
    """θ = 1 + 1e-7 is 1 in float32: log(θ² − 1) must be that of the θ given, with gradient 1/(θ − 1) + 1/(θ + 1)."""
    d, theta = torch.zeros(1), torch.tensor(1 + excess, dtype=torch.float64, requires_grad=True)
    tie = rao_kupper(d, theta)[0, 1]
    assert tie.item() == pytest.approx(math.log(excess / 2), rel=1e-4)  # (θ − 1)/(θ + 1), between equals
    tie.backward()
    assert theta.grad is not None and theta.grad.item() == pytest.approx(1 / excess, rel=2e-3)


# --- labels that err -------------------------------------------------------------------------------


def test_smoothing_by_hand_and_its_finite_optimum() -> None:
    close(smoothed(f64(1, 0, 0.5), 0.1), 0.9, 0.1, 0.5)
    d = f64(math.log(9)).requires_grad_()
    bradley_terry_loss(d, smoothed(f64(1), 0.1)).sum().backward()
    close(d.grad, 0)


@given(d=SCORES, rate=st.floats(0, 0.45))
@pytest.mark.parametrize("true", [0.0, 1.0, 0.5])
def test_the_correction_for_flips_is_unbiased(d, rate, true) -> None:
    """Over the flip, drawn with its rate, its expectation is the loss of the label as it was."""
    as_it_was = bradley_terry_loss(f64(d), f64(true))
    kept, turned = (bradley_terry_loss(f64(d), unflipped(f64(y), rate)) for y in (true, 1 - true))
    torch.testing.assert_close((1 - rate) * kept + rate * turned, as_it_was, rtol=1e-9, atol=1e-9)


def test_flips_corrected_by_hand_and_against_smoothing() -> None:
    """(y − 0.1)/0.8. Of labels of which one in ten is turned, smoothing stays with what they say, this goes back."""
    close(unflipped(f64(1, 0, 0.5), 0.1), 1.125, -0.125, 0.5)
    y = f64(0.0, 0.2, 0.5, 1.0)
    torch.testing.assert_close(unflipped(smoothed(y, 0.2), 0.2), y)
    said = f64(0.75 * 0.9 + 0.25 * 0.1)  # preferred with ¾, then turned over with a tenth
    for target, optimum in ((unflipped(said, 0.1), 0.75), (smoothed(said, 0.1), 0.7 * 0.8 + 0.1)):
        d = torch.logit(f64(optimum)).requires_grad_()
        bradley_terry_loss(d, target).sum().backward()
        close(d.grad, 0)


# --- margins and penalties -------------------------------------------------------------------------


def test_margins_by_hand() -> None:
    """The preferred one leads by ln 3 and should by ln 3: as if they were equal. A tie has no margin."""
    close(less_margin(f64(LN3, -LN3, 1), f64(1, 0, 0.5), f64(LN3, LN3, 7)), 0, 0, 1)
    close(bradley_terry_loss(less_margin(f64(LN3), f64(1), LN3), f64(1)), LN2)
    close(less_margin(f64(2), f64(0.25), 0.5), 2.5)  # the second is preferred, softly


@given(d=SCORES, margin=st.floats(0, 5), y=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_margin_knows_no_first_response(d, margin, y) -> None:
    close(less_margin(f64(-d), f64(1 - y), margin), -float(less_margin(f64(d), f64(y), margin)))


def test_centering_by_hand() -> None:
    close(centering_penalty(f64(1, 3, -2), f64(-1, 2, 5)), 0, 25, 9)


# --- scores with an uncertainty --------------------------------------------------------------------


def test_the_probit_by_hand() -> None:
    """z = 3/√(1 + 8) = 1 and Φ(1) = 0.8413447460685429; at equal means nothing is known."""
    p = 0.8413447460685429
    loss = probit_loss(f64(3, 3, 0), f64(9, 9, 2), f64(1, 0, 1))
    close(loss, -math.log(p), -math.log(1 - p), LN2)


def test_the_probit_far_out_and_its_gradients() -> None:
    """−log Φ(−40) ≈ 40²/2 + log(40 √(2π)), where Φ itself is 0."""
    far = probit_loss(f64(-40), f64(1), f64(1))
    assert float(far) == pytest.approx(800 + math.log(40 * math.sqrt(2 * math.pi)), rel=1e-5)
    d, variance = f64(0.7, -2.0).requires_grad_(), f64(0.5, 3.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda d, v: probit_loss(d, v, f64(1, 0.3)), (d, variance))
