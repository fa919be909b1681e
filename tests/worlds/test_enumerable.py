"""The world with a known truth, held against other ways to the same numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.functional import kl_full
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.types import Rollout
from rlhf_env.worlds import enumerable
from rlhf_env.worlds.enumerable import (
    EnumerableWorld,
    best_of_n_log_probs,
    gibbs_log_probs,
    log_z,
    make_env,
    make_vector_env,
)

BETAS = [0.1, 0.3, 1.0, 5.0]


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.fixture(scope="module")
def world() -> EnumerableWorld:
    """64 responses."""
    return EnumerableWorld.make(seed=3, vocab_size=4, length=3)


@pytest.fixture(scope="module")
def full_world() -> EnumerableWorld:
    """The default: 32,768 responses."""
    return EnumerableWorld.make()


def perturbed(policy: CausalLM, scale: float = 0.1, seed: int = 0) -> CausalLM:
    """The policy with noise on every weight, value head included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return policy


def random_log_probs(world: EnumerableWorld, count: int) -> Iterator[Tensor]:
    """Policies near the optimum, near the reference, and near neither."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        noise = torch.randn(len(world.gold), generator=generator, dtype=torch.float64)
        start = (world.optimal_log_probs(), world.ref_log_probs, torch.zeros_like(noise))[i % 3]
        yield (start + noise * 10 ** (-(i % 5))).log_softmax(0)


# --- the formulas, by hand -------------------------------------------------------------------------


def test_gibbs_by_hand() -> None:
    """ref = (3/4, 1/4) and r = (0, β ln 3) weigh 3/4 each: π* = (1/2, 1/2), Z = 3/2."""
    ref, reward = f64(0.75, 0.25).log(), f64(0, 2 * math.log(3))
    torch.testing.assert_close(gibbs_log_probs(ref, reward, 2.0).exp(), f64(0.5, 0.5))
    assert log_z(ref, reward, 2.0).item() == pytest.approx(math.log(1.5))


def test_best_of_n_by_hand() -> None:
    """F = (1/2, 3/4, 1), squared (1/4, 9/16, 1)."""
    ref = f64(0.5, 0.25, 0.25).log()
    torch.testing.assert_close(best_of_n_log_probs(ref, f64(0, 1, 2), 2).exp(), f64(4, 5, 7) / 16)
    torch.testing.assert_close(best_of_n_log_probs(ref, f64(2, 0, 1), 2).exp(), f64(12, 1, 3) / 16)
    torch.testing.assert_close(best_of_n_log_probs(ref, f64(0, 1, 1), 2).exp(), f64(2, 3, 3) / 8)  # a tie
    torch.testing.assert_close(best_of_n_log_probs(ref, f64(0, 1, 2), 1).exp(), ref.exp())


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_without_a_price_on_kl_there_is_no_gibbs_policy(world: EnumerableWorld, beta: float) -> None:
    with pytest.raises(ConfigError, match="beta must be positive"):
        world.optimal_log_probs(beta)


def test_best_of_none() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        best_of_n_log_probs(f64(0), f64(0), 0)


# --- the list of responses -------------------------------------------------------------------------


def test_responses_are_listed_in_counting_order() -> None:
    tiny = EnumerableWorld.make(vocab_size=3, length=2)
    assert tiny.sequences.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert EnumerableWorld.make(vocab_size=3, length=1).sequences.tolist() == [[0], [1], [2]]


def test_the_default_world(full_world: EnumerableWorld) -> None:
    assert full_world.sequences.shape == (32_768, 5)
    assert full_world.ref_log_probs.dtype == full_world.gold.dtype == torch.float64
    assert full_world.ref_log_probs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert repr(full_world) == "EnumerableWorld(seed=0, vocab_size=8, length=5, beta=0.5, language='transformer')"


def test_log_probs_are_the_chain_rule_one_prefix_at_a_time(world: EnumerableWorld) -> None:
    model = world.policy().model
    for row in (0, 6, 27, 63):
        total = 0.0
        for t in range(3):
            context = torch.tensor([[0, *world.sequences[row, :t].tolist()]])
            logits = model(input_ids=context).logits[0, -1].double()
            total += logits.log_softmax(-1)[world.sequences[row, t]].item()
        assert world.ref_log_probs[row].item() == pytest.approx(total, abs=1e-5)


class EvaluateOnly:
    """A policy that says no more than the Protocol asks for."""

    def __init__(self, policy: CausalLM) -> None:
        self.parameters, self.decoder, self._evaluate = policy.parameters, policy.decoder, policy.evaluate

    def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        return self._evaluate(rollout)


def test_any_policy_can_be_listed(world: EnumerableWorld) -> None:
    policy = perturbed(world.policy()).double()
    listed = world.sequence_log_probs(policy)
    torch.testing.assert_close(world.sequence_log_probs(EvaluateOnly(policy)), listed, rtol=0, atol=1e-12)
    assert listed.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_policy_of_another_law_is_refused(world: EnumerableWorld) -> None:
    class AtTemperatureTwo(EvaluateOnly):  # without saying so
        def evaluate(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
            logp, values, entropy = super().evaluate(rollout)
            return logp / 2, values, entropy

    with pytest.raises(ValueError, match=r"add up to [\d.]+, not 1"):
        world.sequence_log_probs(AtTemperatureTwo(world.policy()))
    with pytest.raises(ValueError, match="add up to nan, not 1"):
        world.gain(perturbed(world.policy(), scale=math.nan))


def test_listing_in_parts_changes_nothing(world: EnumerableWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = perturbed(world.policy()).double()
    listed, (objective, gradient) = world.sequence_log_probs(policy), world.exact_gradient(policy)
    monkeypatch.setattr(enumerable, "_PREFIXES_PER_PASS", 3)  # 16 prefixes: five parts and a rest
    torch.testing.assert_close(world.sequence_log_probs(policy), listed, rtol=0, atol=1e-12)
    objective_in_parts, gradient_in_parts = world.exact_gradient(policy)
    assert objective_in_parts == pytest.approx(objective, abs=1e-12)
    torch.testing.assert_close(gradient_in_parts, gradient, rtol=0, atol=1e-12)


# --- a world is its seed ---------------------------------------------------------------------------


def test_the_same_seed_is_the_same_world_to_the_bit(world: EnumerableWorld) -> None:
    torch.manual_seed(99)
    again = EnumerableWorld.make(seed=3, vocab_size=4, length=3)
    assert torch.equal(again.ref_log_probs, world.ref_log_probs) and torch.equal(again.gold, world.gold)
    for (name, a), b in zip(again.reference.state_dict().items(), world.reference.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_seed_is_another_world(world: EnumerableWorld) -> None:
    other = EnumerableWorld.make(seed=4, vocab_size=4, length=3)
    assert (other.ref_log_probs - world.ref_log_probs).abs().max() > 0.1
    assert (other.gold - world.gold).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_has_learned_something(seed: int) -> None:
    world = EnumerableWorld.make(seed)
    entropy = -(world.ref_log_probs.exp() * world.ref_log_probs).sum().item() / (5 * math.log(8))
    assert 0.55 < entropy < 0.9  # of a uniform policy's


@pytest.mark.parametrize(
    "size", [{"vocab_size": 1}, {"vocab_size": 27}, {"length": 0}, {"vocab_size": 26, "length": 5}]
)
def test_worlds_that_cannot_be_listed(size: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="2 to 26 letters"):
        EnumerableWorld.make(**size)


def test_a_world_needs_a_positive_beta() -> None:
    with pytest.raises(ConfigError, match="beta must be positive, got 0"):
        EnumerableWorld.make(beta=0)


# --- gold ------------------------------------------------------------------------------------------


def test_gold_has_mean_zero_and_variance_one_under_the_reference(full_world: EnumerableWorld) -> None:
    weights = full_world.ref_log_probs.exp()
    assert (weights * full_world.gold).sum().item() == pytest.approx(0, abs=1e-12)
    assert (weights * full_world.gold**2).sum().item() == pytest.approx(1, abs=1e-12)


def test_gold_is_more_than_linear(world: EnumerableWorld) -> None:
    one_hot = torch.nn.functional.one_hot(world.sequences, 4).flatten(1).double().numpy()
    fitted = one_hot @ np.linalg.lstsq(one_hot, world.gold.numpy(), rcond=None)[0]
    unexplained = np.var(world.gold.numpy() - fitted) / np.var(world.gold.numpy())
    assert 0.01 < unexplained < 0.9


def test_gold_can_be_asked_for_by_text(full_world: EnumerableWorld) -> None:
    rows = torch.randperm(32_768, generator=torch.Generator().manual_seed(0))[:200]
    texts = full_world.reference.tokenizer.batch_decode(full_world.sequences[rows])
    scores = full_world.reward_model(["a"] * 200, texts)
    assert scores.tolist() == full_world.gold[rows].tolist()
    assert full_world.reward_model(["a"], ["aaabc"]).tolist() == [full_world.gold[8 + 2].item()]  # 0·… + 1·8 + 2
    assert full_world.reward_model([], []).shape == (0,)


@pytest.mark.parametrize("text", ["", "aaaa", "aaaaaa", "aaaai", "aaaaA", "a aaa"])
def test_text_that_is_no_response_of_this_world(full_world: EnumerableWorld, text: str) -> None:
    with pytest.raises(RewardError, match="response 1 is .* 5 of the letters abcdefgh"):
        full_world.reward_model(["a", "a"], ["aaaaa", text])


# --- the optimum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_attains_its_value(full_world: EnumerableWorld, beta: float) -> None:
    best = full_world.optimal_log_probs(beta)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert full_world.objective(best, beta).item() == pytest.approx(full_world.optimal_value(beta).item(), abs=1e-9)
    assert full_world.gain(best, beta) == pytest.approx(1, abs=1e-9)
    assert full_world.regret(best, beta) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_beats_the_optimum_and_regret_is_beta_kl_to_it(world: EnumerableWorld, beta: float) -> None:
    best = world.optimal_log_probs(beta)
    for log_probs in random_log_probs(world, 60):
        assert world.objective(log_probs, beta) <= world.optimal_value(beta) + 1e-12
        assert world.regret(log_probs, beta) == pytest.approx(beta * kl_full(log_probs, best).item(), abs=1e-9)
        assert world.gain(log_probs, beta) <= 1 + 1e-12


def test_when_kl_is_dear_the_optimum_is_the_reference(world: EnumerableWorld) -> None:
    """β log E exp(r/β) = 1/(2β) + O(1/β²) for a reward of mean 0 and variance 1."""
    assert world.optimal_value(1e4).item() == pytest.approx(1 / 2e4, rel=1e-3)
    torch.testing.assert_close(world.optimal_log_probs(1e6), world.ref_log_probs, rtol=0, atol=1e-4)


def test_when_kl_is_cheap_the_optimum_is_the_best_response(world: EnumerableWorld) -> None:
    assert world.optimal_value(1e-4).item() == pytest.approx(world.gold.max().item(), abs=2e-3)
    assert world.optimal_log_probs(1e-4).argmax() == world.gold.argmax()


def test_the_frontier_is_concave_with_slope_beta(full_world: EnumerableWorld) -> None:
    betas = [5.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05]
    kl, gold = full_world.frontier(betas)
    assert (kl.diff() > 0).all() and (gold.diff() > 0).all()
    slopes = (gold.diff() / kl.diff()).tolist()
    assert all(low < slope < high for slope, high, low in zip(slopes, betas[:-1], betas[1:], strict=True))


def test_best_of_n_stays_below_its_bound_and_the_frontier(full_world: EnumerableWorld) -> None:
    for n in (1, 2, 8, 128, 2048):
        log_probs = best_of_n_log_probs(full_world.ref_log_probs, full_world.gold, n)
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert full_world.kl(log_probs).item() <= math.log(n) - (n - 1) / n + 1e-6
        for beta in BETAS:
            assert full_world.objective(log_probs, beta) <= full_world.optimal_value(beta)


# --- policies --------------------------------------------------------------------------------------


def test_the_policy_starts_exactly_as_the_reference(world: EnumerableWorld) -> None:
    policy = world.policy()
    log_probs = world.sequence_log_probs(policy)
    assert torch.equal(log_probs, world.ref_log_probs)
    assert world.kl(log_probs).item() == 0
    assert world.gain(policy) == 0
    assert not policy.value_head.weight.any() and not policy.value_head.bias.any()


def test_training_the_policy_leaves_the_reference_alone(world: EnumerableWorld) -> None:
    policy = perturbed(world.policy())
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in world.reference.parameters())
    assert torch.equal(world.sequence_log_probs(world.reference), world.ref_log_probs)
    assert world.kl(world.sequence_log_probs(policy)).item() > 0.01


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_exact_gradient_is_the_slope_of_the_objective(world: EnumerableWorld, beta: float) -> None:
    policy = perturbed(world.policy()).double()
    objective, gradient = world.exact_gradient(policy, beta)
    assert objective == pytest.approx(world.objective(world.sequence_log_probs(policy), beta).item(), abs=1e-12)
    generator = torch.Generator().manual_seed(1)
    parameters, step = list(policy.parameters()), 1e-5
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
        values = []
        for sign in (1, -2, 1):  # ahead, behind, and back again
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * step * d
                values.append(world.objective(world.sequence_log_probs(policy), beta).item())
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-6)


def test_the_exact_gradient_in_one_graph(world: EnumerableWorld) -> None:
    policy = perturbed(world.policy()).double()
    world.objective(world.sequence_log_probs(policy)).backward()
    whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    torch.testing.assert_close(world.exact_gradient(policy)[1], whole, rtol=0, atol=1e-12)


def test_frozen_parameters_have_no_gradient(world: EnumerableWorld) -> None:
    policy = world.policy().freeze_layers(1)
    _, gradient = world.exact_gradient(policy)
    assert [g.shape for g in gradient] == [p.shape for p in policy.parameters() if p.requires_grad]
    assert len(gradient) < len(list(policy.parameters()))


def test_following_the_gradient_closes_the_gap(world: EnumerableWorld) -> None:
    policy = world.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for _ in range(50):
        for p, g in zip(policy.parameters(), world.exact_gradient(policy)[1], strict=True):
            p.grad = -g
        optimizer.step()
    assert 0.95 < world.gain(policy) < 1


# --- a language of bigrams -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bigrams() -> EnumerableWorld:
    """81 responses of a table of bigrams."""
    return EnumerableWorld.make(seed=2, vocab_size=3, length=4, language="bigram")


def test_bigrams_multiply_along_the_response(bigrams: EnumerableWorld) -> None:
    table = bigrams.reference.logits.detach().double().softmax(1)
    for row, letters in enumerate(bigrams.sequences.tolist()):
        probability = 1.0
        for before, after in zip([0, *letters], letters, strict=False):  # the prompt is "a"
            probability *= table[before, after].item()
        assert bigrams.ref_log_probs[row].item() == pytest.approx(math.log(probability), abs=1e-5)


def test_bigrams_are_the_same_world_every_time_and_another_than_the_transformers(bigrams: EnumerableWorld) -> None:
    torch.manual_seed(5)
    again = EnumerableWorld.make(seed=2, vocab_size=3, length=4, language="bigram")
    assert torch.equal(again.ref_log_probs, bigrams.ref_log_probs) and torch.equal(again.gold, bigrams.gold)
    for kwargs in ({"seed": 1, "language": "bigram"}, {"seed": 2, "language": "transformer"}):
        other = EnumerableWorld.make(vocab_size=3, length=4, **kwargs)
        assert (other.ref_log_probs - bigrams.ref_log_probs).abs().max() > 0.1
    with pytest.raises(ConfigError, match="transformer or bigram, got 'trigram'"):
        EnumerableWorld.make(language="trigram")


def test_the_bigram_references_have_learned_something_too() -> None:
    """As much on average as the transformers; single tables differ more."""
    shares = []
    for seed in range(20):
        world = EnumerableWorld.make(seed, 8, 3, language="bigram")
        shares.append(-(world.ref_log_probs.exp() * world.ref_log_probs).sum().item() / (3 * math.log(8)))
    assert 0.7 < np.mean(shares) < 0.8
    assert 0.45 < min(shares) and max(shares) < 0.9


def test_the_policy_on_bigrams_starts_as_they_are_and_can_learn(bigrams: EnumerableWorld) -> None:
    policy = bigrams.policy()
    assert torch.equal(bigrams.sequence_log_probs(policy).detach(), bigrams.ref_log_probs)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(150):
        for p, g in zip(policy.parameters(), bigrams.exact_gradient(policy)[1], strict=True):
            p.grad = -g
        optimizer.step()
    assert 0.98 < bigrams.gain(policy) < 1
    assert torch.equal(bigrams.sequence_log_probs(bigrams.reference), bigrams.ref_log_probs)


def test_exact_best_of_n_is_the_function_on_gold(bigrams: EnumerableWorld) -> None:
    expected = best_of_n_log_probs(bigrams.ref_log_probs, bigrams.gold, 6)
    assert torch.equal(bigrams.best_of_n(6), expected)
    assert bigrams.expected_gold(bigrams.best_of_n(6)) > 1  # E of the best of 6 normal draws is 1.27


# --- any policy, state by state ----------------------------------------------------------------------


def prefixes(world: EnumerableWorld) -> list[list[int]]:
    """Every unfinished response, short ones first."""
    return [list(x) for t in range(world.length) for x in itertools.product(range(world.vocab_size), repeat=t)]


def test_the_observations_are_those_of_the_environment(bigrams: EnumerableWorld) -> None:
    states = bigrams.observations()
    env = make_env(world_seed=2, vocab_size=3, length=4, language="bigram", kl_mode="off")
    assert len(prefixes(bigrams)) == len(states["input_ids"]) == (3**4 - 1) // 2
    for row, letters in enumerate(prefixes(bigrams)):
        shown, _ = env.reset(seed=0)
        for letter in letters:
            shown = env.step(letter)[0]
        assert shown.keys() == states.keys()
        for name, part in shown.items():
            assert states[name].dtype == part.dtype
            np.testing.assert_array_equal(states[name][row], part)


def test_from_states_by_hand() -> None:
    """Two letters, two places: a first letter, then one after a and one after b."""
    world = EnumerableWorld.make(vocab_size=2, length=2)
    states = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log()
    torch.testing.assert_close(world.from_states(states).exp(), f64(0.125, 0.125, 0.675, 0.075))
    assert world.from_states(states.numpy()).dtype == torch.float64


@pytest.mark.parametrize("language", ["transformer", "bigram"])
def test_from_states_is_the_policy_listed(language: str) -> None:
    world = EnumerableWorld.make(seed=1, vocab_size=3, length=4, language=language)
    policy = perturbed(world.policy()).double()
    states, actions = world.observations(), np.arange(3)
    asked = [  # as an environment would ask
        policy.action_log_probs({k: np.repeat(v[[row]], 3, 0) for k, v in states.items()}, actions, world.law)
        for row in range(len(states["input_ids"]))
    ]
    expected = world.sequence_log_probs(policy).detach()
    torch.testing.assert_close(world.from_states(np.stack(asked)), expected, rtol=0, atol=1e-10)
    assert world.kl(expected) > 0.01


def one_hot_policy(world: EnumerableWorld, response: list[int]) -> Tensor:
    """Writes `response`, and a wherever that is impossible."""
    states = torch.full(((world.vocab_size**world.length - 1) // (world.vocab_size - 1), world.vocab_size), -torch.inf)
    for row, letters in enumerate(prefixes(world)):
        states[row, response[len(letters)] if letters == response[: len(letters)] else 0] = 0
    return states


def test_a_deterministic_policy_is_its_only_response(world: EnumerableWorld) -> None:
    for row in (0, 27, 63):
        log_probs = world.from_states(one_hot_policy(world, world.sequences[row].tolist()))
        assert log_probs.exp().nonzero().flatten().tolist() == [row]
        assert world.expected_gold(log_probs).item() == world.gold[row].item()
        assert world.kl(log_probs).item() == pytest.approx(-world.ref_log_probs[row].item(), abs=1e-12)
        assert math.isfinite(world.gain(log_probs)) and world.regret(log_probs) > 0


@pytest.mark.parametrize("beta", BETAS)
def test_no_deterministic_policy_beats_the_best_one(world: EnumerableWorld, beta: float) -> None:
    row, value = world.best_deterministic(beta)
    each = [
        world.objective(world.from_states(one_hot_policy(world, letters)), beta).item()
        for letters in world.sequences.tolist()
    ]
    assert (row, max(each)) == (int(np.argmax(each)), pytest.approx(value, abs=1e-12))
    assert value < world.optimal_value(beta).item()
    if beta == world.beta:
        assert world.best_deterministic() == (row, value)


def test_when_kl_is_cheap_the_best_deterministic_policy_writes_the_best_response(world: EnumerableWorld) -> None:
    assert world.best_deterministic(1e-6)[0] == int(world.gold.argmax())
    assert world.best_deterministic(1e6)[0] == int(world.ref_log_probs.argmax())


def test_tables_that_are_no_policy(world: EnumerableWorld) -> None:
    uniform = torch.full((21, 4), -math.log(4))
    torch.testing.assert_close(world.from_states(uniform), torch.full((64,), -3 * math.log(4), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \[20, 4\], expected \[21, 4\]"):
        world.from_states(uniform[:20])
    for broken in (-0.5, math.nan, math.inf):
        uniform[7, 2] = broken
        with pytest.raises(ValueError, match=r"state 7 add up to .*, not 1"):
            world.from_states(uniform)
    with pytest.raises(ValueError, match="state 0 add up to 0, not 1"):
        world.from_states(torch.full((21, 4), -torch.inf))


@pytest.mark.slow
@pytest.mark.parametrize("language", ["transformer", "bigram"])
def test_a_quarter_of_a_million_responses(language: str) -> None:
    world = EnumerableWorld.make(vocab_size=8, length=6, language=language)
    assert len(world.gold) == 262_144
    assert world.gain(world.optimal_log_probs()) == pytest.approx(1, abs=1e-9)
    assert world.gain(world.policy()) == 0
    assert world.observations()["input_ids"].shape == (37_449, 7)


# --- as an environment -----------------------------------------------------------------------------


def test_an_episode_earns_gold_minus_beta_kl(world: EnumerableWorld) -> None:
    env = make_vector_env(world_seed=3, vocab_size=4, length=3, beta=0.7, num_envs=64, autoreset_mode="Disabled")
    policy = perturbed(world.policy())
    bind_policy(env, policy)
    env.reset(seed=0)
    earned = np.zeros(64)
    for t in range(3):
        _, reward, terminated, truncated, _ = env.step(world.sequences[:, t].numpy())
        earned += reward
    assert terminated.all() and not truncated.any()
    log_ratio = world.sequence_log_probs(policy).detach() - world.ref_log_probs
    np.testing.assert_allclose(earned, (world.gold - 0.7 * log_ratio).numpy(), rtol=0, atol=1e-5)


def test_a_single_environment() -> None:
    world = EnumerableWorld.make(seed=1, vocab_size=3, length=2)
    env = make_env(world_seed=1, vocab_size=3, length=2, kl_mode="off")
    observation, _ = env.reset(seed=0)
    assert observation["input_ids"][:1].tolist() == [0]
    assert env.step(2)[1:4] == (0.0, False, False)
    _, reward, terminated, _, info = env.step(1)
    assert terminated and info["stop_reason"] == "length"
    assert reward == info["score"] == world.gold[2 * 3 + 1].item()


def test_environments_of_one_world_share_their_models() -> None:
    one, two = (make_env(vocab_size=3, length=2) for _ in range(2))
    assert one.task.reference is two.task.reference
    assert one.beta == 0.5
    assert make_env(vocab_size=3, length=2, beta=0.1).beta == 0.1
