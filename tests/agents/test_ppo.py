"""PPO: its gradient is the exact one, padding never reaches it, and it learns what it should."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import gae, gather_logp, masked_sum, ppo_clip_loss, token_rewards
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.training.collect import collect
from rlhf_env.training.loop import train
from rlhf_env.types import Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.builders import make_envs, make_rollout, random_model


def float64_world(seed: int) -> EnumerableWorld:
    """A small world whose reference is computed in float64."""
    world = EnumerableWorld.make(seed, vocab_size=4, length=3)
    reference = world.reference.double()
    return dataclasses.replace(world, reference=reference, ref_log_probs=world.sequence_log_probs(reference))


def listed_rollout(world: EnumerableWorld, policy: CausalLM) -> tuple[Rollout, torch.Tensor]:
    """Every response of the world once, as if collected from `policy`, and its probability [N]."""
    rollout = make_rollout(policy, [[0]] * len(world.sequences), world.sequences.tolist())
    rollout = dataclasses.replace(
        rollout, law=world.law, score=world.gold, beta=torch.full_like(world.gold, world.beta)
    )
    with torch.no_grad():
        logp, ref_logp = (
            gather_logp(m.response_log_probs(rollout)[0], rollout.response_ids) for m in (policy, world.reference)
        )
    reward = token_rewards(world.gold, logp, ref_logp, rollout.response_mask, world.beta)
    return dataclasses.replace(rollout, logp=logp, ref_logp=ref_logp, reward=reward), logp.sum(1).exp()


def test_the_policy_gradient_is_the_exact_gradient_of_reward_minus_beta_kl():
    """Over all responses of an enumerable world, weighted by their probability: no estimate, no tolerance for luck.

    Checks the shaped reward, reward-to-go (GAE at λ = 1), the surrogate and its sign against autograd through the
    enumerated objective.
    """
    world = float64_world(3)
    policy = world.policy()
    with torch.no_grad():
        for p in policy.parameters():  # away from the reference, where the KL term's gradient would vanish
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    rollout, probability = listed_rollout(world, policy)
    assert probability.sum() == pytest.approx(1)
    mask = rollout.response_mask
    advantages = gae(rollout.reward, torch.zeros_like(rollout.reward), mask, gamma=1.0, lam=1.0)
    logp, _, _ = policy.evaluate(rollout)
    # The surrogate is a mean over tokens; N · T times it, with each response weighted, is the sum over responses.
    loss = ppo_clip_loss(logp, rollout.logp, advantages * probability[:, None], mask) * mask.sum()
    ours = torch.autograd.grad(-loss, [p for p in policy.parameters()], allow_unused=True)
    _, exact = world.exact_gradient(policy)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a if a is not None else torch.zeros_like(b), b, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_exact_values_is_the_exact_advantage_on_average(lam):
    """E[Â_t | s_t, a_t] = Q(s_t, a_t) − V(s_t) for every λ once V is exact, and E[Σ reward] = J(π): by listing.

    With first-letter-slowest order, the responses that share a prefix of t letters are V^(T−t) consecutive rows.
    """
    world, policy = float64_world(1), float64_world(2).policy()
    rollout, probability = listed_rollout(world, policy)
    v, t_max = world.vocab_size, world.length
    assert float((probability * rollout.reward.sum(1)).sum()) == pytest.approx(
        float(world.objective(world.sequence_log_probs(policy).detach())), abs=1e-9
    )

    def average_over_futures(x: torch.Tensor, known: int) -> torch.Tensor:
        """E[x | first `known` letters], spread back over the rows [N]."""
        groups, weights = x.reshape(v**known, -1), probability.reshape(v**known, -1)
        mean = (groups * weights).sum(1) / weights.sum(1)
        return mean.repeat_interleave(groups.shape[1])

    to_go = rollout.reward.flip(1).cumsum(1).flip(1)  # [N, T], the return from token t on
    values = torch.stack([average_over_futures(to_go[:, t], t) for t in range(t_max)], dim=1)
    advantages = gae(rollout.reward, values, rollout.response_mask, gamma=1.0, lam=lam)
    for t in range(t_max):
        q = average_over_futures(to_go[:, t], t + 1)
        torch.testing.assert_close(average_over_futures(advantages[:, t], t + 1), q - values[:, t], atol=1e-9, rtol=0)


def test_with_learning_rate_zero_the_policy_stays_itself_for_a_whole_run():
    """First ratio = 1, and every other one too: no dropout, no temperature, no mask on one side only."""
    policy = random_model()
    before = [p.clone() for p in policy.parameters()]
    envs = make_envs(4, reference=random_model(), temperature=0.7, banned_tokens=(8, 10), min_new_tokens=2)
    config = PPOConfig(learning_rate=0.0, batch_size=16, minibatches=3)
    for metrics in train(PPO(policy, config), envs, updates=3):
        assert metrics["max_ratio"] == pytest.approx(1, abs=1e-4)
        assert metrics["first_ratio_error"] < 1e-4
        assert metrics["approx_kl"] < 1e-8
        assert metrics["clip_fraction"] == 0
        assert abs(metrics["kl"]) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("poison", [1e6, float("inf"), float("nan")])
def test_what_stands_in_the_padding_reaches_nothing(poison):
    """Weights after an update are bitwise those of clean padding."""
    envs = make_envs(4, reference=random_model())
    rollout = collect(random_model(seed=1), envs, episodes=16)
    padding = ~rollout.response_mask
    assert padding.any()
    poisoned = dataclasses.replace(
        rollout,
        **{
            name: getattr(rollout, name).masked_fill(padding, poison)
            for name in ("logp", "ref_logp", "values", "reward")
        },
    )
    results = []
    for data in (rollout, poisoned):
        policy = random_model(seed=1)
        metrics = PPO(policy, PPOConfig(learning_rate=1e-3, batch_size=16)).update(data)
        results.append((list(policy.parameters()), metrics))
    (clean, m1), (dirty, m2) = results
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert m1 == m2


def test_one_minibatch_of_all_is_the_gradient_of_all_in_any_order():
    """Permuting episodes changes nothing where every step sees them all."""
    rollout = collect(
        random_model(dtype="float64", seed=1), make_envs(4, reference=random_model(dtype="float64")), episodes=12
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    policies = []
    for data in (rollout, rollout[order]):
        policy = random_model(dtype="float64", seed=1)
        PPO(policy, PPOConfig(learning_rate=1e-3, batch_size=12, minibatches=1, epochs=2)).update(data)
        policies.append(policy)
    for a, b in zip(*(p.parameters() for p in policies), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("field", ["reward", "logp"])
def test_a_non_finite_step_is_refused_and_touches_no_weight(field):
    rollout = collect(random_model(seed=1), make_envs(4, reference=random_model()), episodes=8)
    broken = getattr(rollout, field).clone()
    broken[3, 0] = torch.nan
    policy = random_model(seed=1)
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteError, match=f"{field} of episode 3 of the batch"):
        PPO(policy, PPOConfig(batch_size=8)).update(dataclasses.replace(rollout, **{field: broken}))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_broken_weights_name_the_episode():
    rollout = collect(random_model(seed=1), make_envs(4, reference=random_model()), episodes=8)
    policy = random_model(seed=1)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(torch.inf)  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="episode [0-9]+ of the batch"):
        PPO(policy, PPOConfig(batch_size=8)).update(rollout)


def test_the_learning_rate_falls_linearly_with_the_budget_used():
    envs = make_envs(4, reference=random_model())
    agent = PPO(random_model(), PPOConfig(learning_rate=1e-3, batch_size=8))
    rates = [metrics["learning_rate"] for metrics in train(agent, envs, updates=4)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_same_seed_same_bits():
    runs = []
    for _ in range(2):
        policy = random_model(seed=1)
        agent = PPO(policy, PPOConfig(learning_rate=1e-3, batch_size=8), seed=5)
        rows = [
            {k: v for k, v in m.items() if not k.startswith("seconds")}
            for m in train(agent, make_envs(3, reference=random_model()), updates=3, seed=5)
        ]
        runs.append((rows, list(policy.parameters())))
    (rows1, p1), (rows2, p2) = runs
    assert rows1 == rows2
    assert all(torch.equal(a, b) for a, b in zip(p1, p2, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 2, "minibatches": 4}, {"lam": 1.5}, {"gamma": 0.0}, {"learning_rate": -1.0}, {"epochs": 0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="PPO needs"):
        PPOConfig(**settings)


def test_eos_is_learned_where_pad_is_eos():
    """A reward for stopping at once: an EOS hidden as padding would never be reinforced."""
    tokenizer = char_tokenizer("abcdefgh")
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    policy = CausalLM.from_config(tiny_config("gpt2", len(tokenizer), n_embd=32), tokenizer)
    envs = TextGenerationVectorEnv(
        32,
        prompts=["a", "bc", "def"],
        tokenizer=tokenizer,
        reward_model=lambda prompts, responses: [1.0 - len(r) / 8 for r in responses],
        beta=0.0,
        max_new_tokens=8,
    )
    metrics = list(train(PPO(policy, PPOConfig(learning_rate=3e-3, batch_size=64)), envs, updates=25))
    assert metrics[0]["eos_rate"] < 0.75
    assert metrics[-1]["eos_rate"] > 0.95
    assert metrics[-1]["length"] < 0.5 * metrics[0]["length"]


@pytest.mark.parametrize("seed", range(2))
def test_ppo_comes_near_the_exact_optimum_of_a_small_world(seed):
    world = EnumerableWorld.make(seed, vocab_size=4, length=3)
    policy = world.policy()
    envs = TextGenerationVectorEnv(64, **world.env_kwargs())
    list(train(PPO(policy, PPOConfig(learning_rate=1e-3, batch_size=256), seed=seed), envs, updates=40, seed=seed))
    assert 0.95 < world.gain(policy) <= 1.0


def test_masked_sum_of_a_listed_rollout_is_the_exact_kl():
    """The environment's KL, in expectation, is the enumerated one."""
    world, policy = float64_world(1), float64_world(2).policy()
    rollout, probability = listed_rollout(world, policy)
    kl = masked_sum(rollout.logp - rollout.ref_logp, rollout.response_mask, dim=1)
    with torch.no_grad():
        exact = world.kl(world.sequence_log_probs(policy))
    assert float((probability * kl).sum()) == pytest.approx(float(exact), abs=1e-9)
