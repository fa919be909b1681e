"""Gradient steps: parts of a batch add up to it, what is not finite is refused, and a stopped descent goes on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.models.descent import Descent, mean_metrics, minibatches, passes, require_finite_logp

X = torch.tensor([1.0, 2.0, 6.0, 3.0], dtype=torch.float64)
WEIGHT = torch.tensor([1, 3, 2, 4])


def parameter(value: float = 5.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def squares(w: nn.Parameter, weight: Tensor | None = None):
    """The loss mean_i (w − x_i)², each row as often as `weight` says, and two metrics."""

    def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = torch.ones(len(rows)) if weight is None else weight[rows]
        loss = (share * (w - X[rows]).square()).sum() / share.sum()
        return loss, {"mean_x": (share * X[rows]).sum() / share.sum(), "max_x": X[rows].max()}

    return loss_of


def test_a_first_step_by_hand():
    """x of rows 0, 2: the gradient 2 (5 − 3.5) = 3 is clipped to 1, and Adam's first step is lr · g/(|g| + ε)."""
    w = parameter()
    descent = Descent([w], 0.1, max_grad_norm=1.0, adam_eps=0.5)
    assert descent.begin(0.25) == 0
    metrics = descent.step(squares(w), torch.tensor([0, 2]))
    assert metrics == pytest.approx({"mean_x": 3.5, "max_x": 6, "gradient_norm": 3})
    assert descent.current_rate == pytest.approx(0.075)
    assert w.item() == pytest.approx(5 - 0.075 * 1 / 1.5, abs=1e-6)


@pytest.mark.parametrize(("anneal", "rates"), [(True, [0.4, 0.3, 0.0]), (False, [0.4, 0.4, 0.4])])
def test_the_learning_rate_may_fall_to_zero(anneal, rates):
    descent, found = Descent([parameter()], 0.4, anneal=anneal), []
    for number, progress in enumerate((0.0, 0.25, 1.0)):
        assert descent.begin(progress) == number
        found.append(descent.current_rate)
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_are_weighted_as_the_whole_weighs_their_rows(size):
    """Two steps in parts are two steps on all: a part of many tokens counts for them."""
    found = []
    for micro_batch_size in (0, size):
        w = parameter()
        descent = Descent([w], 0.1, max_grad_norm=math.inf)
        rows = torch.tensor([3, 0, 2, 1])
        steps = [descent.step(squares(w, WEIGHT), rows, WEIGHT, micro_batch_size) for _ in range(2)]
        found.append((w.item(), *(value for step in steps for value in step.values())))
    assert found[1] == pytest.approx(found[0], abs=1e-9)
    assert found[0][1:4] == pytest.approx((3.1, 6, 2 * (5 - 3.1)))  # (1 + 6 + 12 + 12)/10, and the largest of all


def test_no_gradient_is_left_of_the_step_before():
    descent = Descent([parameter()], 0.0, max_grad_norm=math.inf)
    norms = [descent.step(squares(descent.parameters[0]), torch.tensor([0, 2]))["gradient_norm"] for _ in range(3)]
    assert norms == pytest.approx([3, 3, 3])


def test_without_weights_every_row_counts_alike():
    w = parameter()
    metrics = Descent([w], 0.1, max_grad_norm=math.inf).step(squares(w), torch.arange(4), micro_batch_size=2)
    assert metrics == pytest.approx({"mean_x": 3, "max_x": 6, "gradient_norm": 4})


def test_what_is_frozen_is_left_out():
    w, frozen = parameter(), parameter()
    frozen.requires_grad_(False)
    assert Descent([frozen, w], 0.1).parameters == [w]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (lambda w: w * torch.nan, "loss"),
        (lambda w: w * torch.inf, "loss"),
        (lambda w: (w - 5).square().sqrt(), "gradient"),  # finite itself, its gradient is 0/0
    ],
)
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_what_is_not_finite_is_not_stepped_along(broken, what, micro_batch_size):
    w = parameter()
    descent = Descent([w], 0.1)
    descent.begin(0.0)
    descent.step(squares(w), torch.arange(4))
    with torch.no_grad():
        w.fill_(5.0)
    state = {key: value.clone() for key, value in descent.optimizer.state[w].items()}
    descent.begin(0.5)
    with pytest.raises(NonFiniteError, match=rf"the {what} of episodes? .* of the batch became .* in update 2"):
        descent.step(lambda rows: (broken(w), {}), torch.arange(4), micro_batch_size=micro_batch_size)
    assert w.item() == 5
    assert all(torch.equal(state[key], value) for key, value in descent.optimizer.state[w].items())


def test_of_a_large_batch_the_first_episodes_are_named():
    w = parameter()
    descent = Descent([w], 0.1)
    with pytest.raises(NonFiniteError, match="the loss of episodes 5, 6, 7, 8, 9, 10, 11, 12, … of the batch"):
        descent.step(lambda rows: (w * torch.nan, {}), torch.arange(5, 20))
    with pytest.raises(NonFiniteError, match="the loss of episode 3 of the batch"):
        descent.step(lambda rows: (w * torch.nan, {}), torch.tensor([3]))


def test_the_first_episode_whose_log_probability_broke_is_named():
    logp = torch.tensor([[-1.0, torch.nan], [-1.0, -torch.inf], [torch.nan, -1.0]])
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    require_finite_logp(logp[:1], mask[:1], torch.tensor([7]))  # what stands in the padding does not count
    with pytest.raises(NonFiniteError, match="log-probabilities of episode 8 of the batch"):
        require_finite_logp(logp, mask, torch.tensor([7, 8, 9]))


def test_a_stopped_descent_goes_on():
    def run(stop: bool) -> tuple[float, int]:
        w = parameter()
        descent = Descent([w], 0.1)
        for update in range(6):
            if stop and update == 3:
                state, descent = descent.state_dict(), Descent([w], 0.1)
                descent.load_state_dict(state)
            descent.begin(update / 6)
            descent.step(squares(w), torch.tensor([update % 4]))
        return w.item(), descent.updates

    assert run(stop=True) == run(stop=False)
    assert run(stop=True)[1] == 6


# --- which rows -------------------------------------------------------------------------------------


def test_minibatches_hold_every_row_once_and_are_of_nearly_equal_length():
    found = list(minibatches(10, 4, np.random.default_rng(0)))
    assert sorted(map(len, found)) == [2, 2, 3, 3]
    order = torch.cat(found).tolist()
    assert sorted(order) == list(range(10)) != order
    assert [part.tolist() for part in minibatches(10, 4, np.random.default_rng(0))] == [p.tolist() for p in found]


def test_the_next_minibatches_come_in_another_order():
    shuffle = np.random.default_rng(0)
    first, second = (torch.cat(list(minibatches(10, 2, shuffle))).tolist() for _ in range(2))
    assert first != second


def test_there_are_no_empty_minibatches():
    assert sorted(len(part) for part in minibatches(3, 4, np.random.default_rng(0))) == [1, 1, 1]


def test_every_pass_holds_every_row_once_in_an_order_of_its_own():
    found = list(passes(7, 3, seed=1, epochs=2))
    assert [(step, steps, len(rows)) for step, steps, rows in found] == [
        (0, 6, 3), (1, 6, 3), (2, 6, 1), (3, 6, 3), (4, 6, 3), (5, 6, 1),
    ]  # fmt: skip
    first, second = (torch.cat([rows for _, _, rows in found[k : k + 3]]).tolist() for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_passes_go_on_where_they_stopped_and_end_with_the_steps_asked_for():
    whole = [(step, steps, rows.tolist()) for step, steps, rows in passes(7, 3, seed=1, epochs=9, updates=5)]
    rest = [(step, steps, rows.tolist()) for step, steps, rows in passes(7, 3, seed=1, epochs=9, updates=5, start=2)]
    assert len(whole) == 5 and rest == whole[2:]
    assert [rows.tolist() for *_, rows in passes(7, 3, seed=2, epochs=9, updates=5)] != [rows for *_, rows in whole]


def test_means_over_steps_and_the_largest_of_what_is_called_so():
    steps = [{"loss": 1.0, "max_ratio": 2.0}, {"loss": 4.0, "max_ratio": 1.5}, {"loss": 1.0, "max_ratio": 1.0}]
    assert mean_metrics(steps) == {"loss": 2.0, "max_ratio": 2.0}
    assert mean_metrics([]) == {}


def test_in_half_precision_small_steps_add_up():
    """1,000 steps of 1e-5 are 1e-2: in bfloat16 itself 1 − 1e-5 is 1, so that none of them would be seen."""
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    descent = Descent([w], 1e-5, anneal=False, max_grad_norm=math.inf, adam_eps=1e-12)
    descent.begin(0.0)
    for _ in range(1000):
        descent.step(lambda rows: (w.float().sum(), {}), torch.arange(1))
    torch.testing.assert_close(w.float(), torch.full((3,), 1 - 1e-2), atol=4e-3, rtol=0)
    saved, again = descent.state_dict(), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    other = Descent([again], 1e-5)
    other.load_state_dict(saved)
    assert torch.equal(other.masters[0], descent.masters[0])


def test_a_frozen_policy_has_nothing_to_learn_with():
    with pytest.raises(ConfigError, match="the policy is frozen, as references are"):
        Descent([nn.Parameter(torch.ones(1), requires_grad=False)], 0.1)


@pytest.mark.parametrize("settings", [{"max_grad_norm": -1.0}, {"max_grad_norm": 0.0}, {"adam_eps": -1e-5}])
def test_a_step_that_would_climb_the_loss_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Descent([parameter()], 0.1, **settings)
