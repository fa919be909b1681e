"""PPO: its gradient is the exact one, padding never reaches it, and it learns what it should."""

from __future__ import annotations

import copy
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


class Recorded:
    """A policy that notes which episodes each gradient step saw, by their scores."""

    def __init__(self, policy: CausalLM) -> None:
        self.policy, self.scores = policy, []

    def evaluate(self, rollout: Rollout):
        self.scores.append(rollout.score.tolist())
        return self.policy.evaluate(rollout)

    def parameters(self):
        return self.policy.parameters()


def written_out(policy: CausalLM, rollout: Rollout, c: PPOConfig, steps: list[list[int]], progress: float) -> None:
    """PPO's update with loops over tokens and unpadded rows, and no code of ours but the value head."""
    advantages, returns = [], []
    for i, n in enumerate(rollout.lengths.tolist()):
        r, v = rollout.reward[i, :n].tolist(), [*rollout.values[i, :n].tolist(), 0.0]
        delta = [r[t] + c.gamma * v[t + 1] - v[t] for t in range(n)]
        advantages.append([sum((c.gamma * c.lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
        returns.append([a + b for a, b in zip(advantages[i], v, strict=False)])
    every = [a for row in advantages for a in row]
    mean = sum(every) / len(every)
    deviation = (sum((a - mean) ** 2 for a in every) / len(every)) ** 0.5
    optimizer = torch.optim.Adam(policy.parameters(), lr=(1 - progress) * c.learning_rate, eps=c.adam_eps)
    for episodes in steps:
        surrogate, value_error, entropy = [], [], []
        for i in episodes:
            n, prompt = len(advantages[i]), rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
            response = rollout.response_ids[i, :n].tolist()
            output = policy.model(torch.tensor([prompt + response]), output_hidden_states=True)  # type: ignore[operator]
            values = policy.value_head(output.hidden_states[-1][0, len(prompt) - 1 : -1])[:, 0]
            log_probs = (output.logits[0, len(prompt) - 1 : -1] / rollout.law.temperature).log_softmax(-1)
            for t in range(n):
                ratio = (log_probs[t, response[t]] - rollout.logp[i, t]).exp()
                a, target, old = (advantages[i][t] - mean) / deviation, returns[i][t], rollout.values[i, t]
                surrogate.append(torch.minimum(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a))
                clipped = old + (values[t] - old).clamp(-c.value_clip, c.value_clip)
                value_error.append(torch.maximum((values[t] - target) ** 2, (clipped - target) ** 2))
                entropy.append(-(log_probs[t].exp() * log_probs[t]).sum())
        loss = -torch.stack(surrogate).mean() + c.value_coef * 0.5 * torch.stack(value_error).mean()
        loss = loss - c.entropy_coef * torch.stack(entropy).mean()
        gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
        norm = sum((g**2).sum() for g in gradients if g is not None) ** 0.5
        assert norm > c.max_grad_norm, "the limit must bind to be tested"
        for p, g in zip(policy.parameters(), gradients, strict=True):
            p.grad = None if g is None else g * c.max_grad_norm / (norm + 1e-6)
        optimizer.step()


def test_an_update_is_the_paper_written_out():
    """Every setting away from its default, minibatches of unequal episodes, ratios that are clipped."""
    config = PPOConfig(
        learning_rate=0.02, batch_size=6, epochs=2, minibatches=2, clip=0.1,
        value_clip=0.05, value_coef=0.3, entropy_coef=0.2, gamma=0.9, lam=0.7, max_grad_norm=0.4, adam_eps=1e-4,
    )  # fmt: skip

    def fresh() -> CausalLM:
        policy = random_model(dtype="float64", seed=1)
        torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
        return policy

    envs = make_envs(3, reference=random_model(dtype="float64"), temperature=0.8)
    rollout = collect(fresh(), envs, episodes=6, seed=3)
    assert len(rollout.lengths.unique()) > 1
    rollout = dataclasses.replace(rollout, score=torch.arange(6.0, dtype=torch.float64))  # a name for each episode
    policy = Recorded(fresh())
    metrics = PPO(policy, config).update(rollout, progress=0.25)  # type: ignore[arg-type]
    assert metrics["clip_fraction"] > 0
    steps = [[int(score) for score in scores] for scores in policy.scores]
    assert [sorted(a + b) for a, b in (steps[:2], steps[2:])] == [list(range(6))] * 2
    assert sorted(steps[0]) != sorted(steps[2]), "each pass shuffles anew"
    expected = fresh()
    written_out(expected, rollout, config, steps, progress=0.25)
    for a, b in zip(policy.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)  # whitening's ε of 1e-8 is all that differs


# --- the scale of rewards --------------------------------------------------------------------------


def two_batches() -> list[Rollout]:
    envs = make_envs(4, reference=random_model(dtype="float64"))
    return [collect(random_model(seed=1, dtype="float64"), envs, episodes=8, seed=seed) for seed in (1, 2)]


def learned(config: PPOConfig, batches: list[Rollout]) -> torch.Tensor:
    agent = PPO(random_model(seed=1, dtype="float64"), config)
    for batch in batches:
        agent.update(batch)
    return torch.cat([weight.flatten() for weight in agent.policy.parameters()])


def divided(rollout: Rollout, by: list[Rollout]) -> Rollout:
    seen = torch.cat([other.reward[other.response_mask] for other in by])
    return dataclasses.replace(rollout, reward=rollout.reward / (seen.square().sum() / len(seen)).sqrt())


@pytest.mark.parametrize("scale", ["batch", "running"])
def test_rewards_are_divided_by_their_root_mean_square_of_this_batch_or_of_all_so_far(scale):
    first, second = batches = two_batches()
    plain, config = PPOConfig(learning_rate=1e-3), PPOConfig(learning_rate=1e-3, reward_scale=scale)
    kept = second.reward.clone()
    expected = learned(plain, [divided(first, [first]), divided(second, batches if scale == "running" else [second])])
    torch.testing.assert_close(learned(config, batches), expected, atol=1e-9, rtol=0)
    assert not torch.allclose(learned(plain, batches), expected, atol=1e-6)
    assert torch.equal(second.reward, kept), "what the environment reports stays what it is"


@pytest.mark.parametrize("scale", ["batch", "running"])
def test_scaled_the_unit_of_reward_does_not_matter(scale):
    """Score and β in another unit, and the same update: unscaled, the value loss would outweigh all else."""
    config, batches = PPOConfig(learning_rate=1e-3, reward_scale=scale), two_batches()
    louder = [dataclasses.replace(batch, reward=1000 * batch.reward) for batch in batches]
    torch.testing.assert_close(learned(config, louder), learned(config, batches), atol=1e-9, rtol=0)


def test_rewards_of_zero_stay_zero():
    batch = dataclasses.replace(two_batches()[0], reward=torch.zeros_like(two_batches()[0].reward))
    config = PPOConfig(learning_rate=1e-3)
    assert torch.equal(learned(dataclasses.replace(config, reward_scale="batch"), [batch]), learned(config, [batch]))


def test_the_running_scale_is_part_of_the_state():
    first, second = two_batches()
    config = PPOConfig(learning_rate=1e-3, reward_scale="running")
    one, two = (PPO(random_model(seed=1, dtype="float64"), config) for _ in range(2))
    one.update(first)
    two.policy.load_state_dict(one.policy.state_dict())  # type: ignore[attr-defined]
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for agent in (one, two):
        agent.update(second)
    assert all(map(torch.equal, one.policy.parameters(), two.policy.parameters()))


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


def test_fewer_episodes_than_minibatches_are_a_minibatch_each():
    rollout = collect(random_model(seed=1), make_envs(4, reference=random_model()), episodes=2)
    policy = Recorded(random_model(seed=1))
    PPO(policy, PPOConfig(epochs=1, minibatches=4)).update(rollout)  # type: ignore[arg-type]
    assert [len(scores) for scores in policy.scores] == [1, 1]


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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
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
