"""Evaluation: numbers by hand, and anchors whose value is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.config import build, read_layer
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.records.run import Run
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, EvaluateConfig, GenerateConfig
from rlhf_env.training.evaluate import best_of_n_path, distinct_n, evaluate, perplexity, token_rows
from rlhf_env.training.inference import BEST_OF_SEED, generate, run_evaluation
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.builders import ALPHABET, PROMPTS, make_envs, make_rollout, random_model
from tests.tiny_files import write_letter_files


def test_distinct_n_by_hand():
    rollout = make_rollout(random_model(), [[0], [0]], [[1, 2, 1, 2], [3]], right=2)
    assert distinct_n(rollout, 1) == 3 / 5  # 1 2 1 2 3
    assert distinct_n(rollout, 2) == 2 / 3  # 12 21 12


def test_the_reference_ties_with_itself():
    model = random_model()
    result = evaluate(model, make_envs(4, reference=model), episodes=32)
    assert result.metrics["win_rate"] == 0.5
    assert abs(result.metrics["kl"]) < 1e-4
    assert result.metrics["score"] == pytest.approx(result.metrics["reference_score"])
    assert all(row["response"] == row["reference_response"] for row in result.samples)


def test_intervals_cover_what_they_should():
    """On an enumerable world the truth is known: of 60 intervals of 95 %, binomially 51 to 60 hold it (p > 0.999)."""
    world, policy = (
        EnumerableWorld.make(0, vocab_size=4, length=3),
        EnumerableWorld.make(1, vocab_size=4, length=3).policy(),
    )
    envs = TextGenerationVectorEnv(128, **world.env_kwargs())
    with torch.no_grad():
        log_probs = world.sequence_log_probs(policy)
    kl, gold = float(world.kl(log_probs)), float(world.expected_gold(log_probs))
    covered = {"kl": 0, "gold": 0}
    for seed in range(60):
        m = evaluate(policy, envs, episodes=128, gold=world.reward_model, seed=seed).metrics
        assert m["gold"] == pytest.approx(m["score"])
        covered["kl"] += m["kl_low"] < kl < m["kl_high"]
        covered["gold"] += m["gold_low"] < gold < m["gold_high"]
    assert all(51 <= count <= 60 for count in covered.values()), covered


def test_perplexity_is_that_of_the_model_itself_across_windows():
    policy = random_model()
    envs = make_envs(1, reference=policy)
    text = "abcdefghhgfedcba" * 10  # 160 tokens in a context of 64
    ids = torch.tensor(policy.tokenizer.encode(text))
    total = 0.0
    for start in range(0, 159, 63):
        piece = ids[start : start + 64][None]
        logits = policy.model(piece).logits[0, :-1].log_softmax(-1)  # type: ignore[operator]
        total -= logits.gather(-1, piece[0, 1:, None]).sum().item()
    assert perplexity(policy, envs.task, text) == pytest.approx(math.exp(total / 159), rel=1e-4)
    with pytest.raises(DataError, match="two tokens"):
        perplexity(policy, envs.task, "a")


def test_evaluation_leaves_an_adaptive_beta_alone():
    envs = make_envs(4, beta=AdaptiveBeta(initial=0.1, target=0.001, horizon=10))
    evaluate(random_model(seed=1), envs, episodes=8)
    assert envs.beta == pytest.approx(0.1)


def test_gold_sees_the_prompts_as_they_were_given():
    seen = []

    def gold(prompts, responses):
        seen.extend(prompts)
        return np.zeros(len(prompts))

    evaluate(random_model(), make_envs(2), ["abc", "d"], gold=gold)
    assert seen == ["abc", "d"] * 2  # of the policy's responses, then of the reference's


# --- the reference beside it -----------------------------------------------------------------------


def test_what_is_said_of_the_reference_is_what_evaluating_it_says():
    policy, reference = random_model(seed=1), random_model()
    prompts = ["abc", "d", "efghab", "ca"] * 5
    gold = lambda prompts, responses: [float(len(response)) for response in responses]  # noqa: E731
    both = evaluate(policy, make_envs(4, reference=reference), prompts, gold=gold, seed=3)
    alone = evaluate(reference, make_envs(4, reference=None, beta=0.0), prompts, gold=gold, seed=3)
    theirs = {k.removeprefix("reference_"): v for k, v in both.metrics.items() if k.startswith("reference_")}
    assert theirs == pytest.approx(alone.metrics)
    assert {"score", "gold", "length", "eos_rate", "distinct_1", "distinct_2"} <= theirs.keys()
    assert both.metrics["score"] != pytest.approx(theirs["score"])
    for row, other in zip(both.samples, alone.samples, strict=True):
        assert {k.removeprefix("reference_"): v for k, v in row.items() if k.startswith("reference_")} == pytest.approx(
            {k: v for k, v in other.items() if k != "prompt"}
        )
        assert row["gold"] == len(row["response"]) and row["prompt"] == other["prompt"]
    wins = [(r["score"] > r["reference_score"]) + 0.5 * (r["score"] == r["reference_score"]) for r in both.samples]
    assert both.metrics["win_rate"] == pytest.approx(sum(wins) / 20)


# --- every token's numbers -------------------------------------------------------------------------

NAMES = [*ALPHABET, "<bos>", "<eos>", "<pad>"]


@pytest.fixture(scope="module", params=["token", "terminal"])
def measured(request):
    """An evaluation of 16 responses by a policy with a critic, its rollouts, and whose token numbers it kept."""
    policy, reference = random_model(seed=1), random_model()
    with torch.no_grad():
        policy.value_head.weight[0, :4] = 0.3  # not all of it: the hidden states of a layer norm have mean 0
        reference.value_head.weight[0, 4:9] = -0.2
    envs = make_envs(4, reference=reference, missing_eos_penalty=0.7, kl_placement=request.param)
    prompts = ["abc", "d", "efghab", "ca"] * 4
    found = evaluate(policy, envs, prompts, seed=5, gold=lambda prompts, responses: [1.0] * len(responses))
    rollouts = {
        "policy": collect(policy, envs, prompts, seed=5),
        "reference": collect(reference, envs, prompts, seed=5),
    }
    return found, rollouts, {"policy": policy, "reference": reference}


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_the_pieces_of_a_response_are_its_tokens_eos_included(measured, who):
    found, rollouts, _ = measured
    assert len(found.tokens) == 12  # the first ones
    column = {"policy": "response", "reference": "reference_response"}[who]
    ends = 0
    for i, (row, sample) in enumerate(zip(found.tokens, found.samples, strict=False)):
        ids = rollouts[who].response_ids[i][rollouts[who].response_mask[i]].tolist()
        assert row["prompt"] == sample["prompt"]
        assert row[who]["pieces"] == [NAMES[token] for token in ids]
        assert "".join(piece for piece in row[who]["pieces"] if piece in ALPHABET) == sample[column]
        assert all(len(numbers) == len(ids) for numbers in row[who]["numbers"].values())
        ends += row[who]["pieces"][-1] == "<eos>"
    assert 0 < ends < 12


def test_penalties_are_measured_where_there_are_any(measured):
    found, rollouts, _ = measured
    for prefix, rollout in (("", rollouts["policy"]), ("reference_", rollouts["reference"])):
        penalty = 0.7 * float((~rollout.ended).float().mean())
        assert found.metrics[f"{prefix}penalty"] == pytest.approx(penalty) and penalty > 0
        assert found.metrics[f"{prefix}penalty_low"] < penalty < found.metrics[f"{prefix}penalty_high"]
    assert "penalty" not in evaluate(random_model(), make_envs(4, reference=random_model()), ["abc"]).metrics


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_the_rewards_of_the_tokens_add_up_to_score_less_kl_and_penalty(measured, who):
    found, rollouts, _ = measured
    for row, sample in zip(found.tokens, found.samples, strict=False):
        numbers, facts = row[who]["numbers"], row[who]["facts"]
        score, kl = sample["score" if who == "policy" else "reference_score"], sum(numbers["kl"])
        penalty = 0.0 if row[who]["pieces"][-1] == "<eos>" else 0.7
        assert sum(numbers["reward"]) == pytest.approx(score - 0.3 * kl - penalty, abs=1e-5)
        assert kl == pytest.approx(sample["kl"] if who == "policy" else 0.0, abs=1e-4)
        expected = {"score": score, "gold": 1.0, "length": len(row[who]["pieces"])}
        assert facts == expected | ({"kl": sample["kl"]} if who == "policy" else {})
    assert len({len(row[who]["pieces"]) for row in found.tokens}) > 1


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_the_ratio_is_how_much_likelier_the_policy_makes_a_token_than_the_reference(measured, who):
    found, rollouts, models = measured
    shown = rollouts[who][:12]
    now, then = (models[name].evaluate(shown)[0].detach() for name in ("policy", "reference"))
    for row, mask, difference in zip(found.tokens, shown.response_mask, now - then, strict=True):
        assert row[who]["numbers"]["ratio"] == pytest.approx(difference[mask].exp().tolist(), rel=1e-4)
        if who == "policy":
            assert row[who]["numbers"]["ratio"] == pytest.approx(np.exp(row[who]["numbers"]["kl"]), rel=1e-6)


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_value_and_advantage_are_of_the_model_that_wrote_the_token(measured, who):
    found, rollouts, models = measured
    values = models[who].evaluate(rollouts[who][:12])[1].detach()
    for row, mask, value in zip(found.tokens, rollouts[who].response_mask, values, strict=False):
        numbers = row[who]["numbers"]
        assert numbers["value"] == pytest.approx(value[mask].tolist(), abs=1e-4)
        to_come = [sum(numbers["reward"][t:]) for t in range(len(numbers["reward"]))]
        assert numbers["advantage"] == pytest.approx(np.subtract(to_come, numbers["value"]), abs=1e-4)
    assert any(abs(v) > 0.1 for row in found.tokens for v in row[who]["numbers"]["value"])


def test_for_equal_policies_every_ratio_is_one_and_every_kl_zero():
    model = random_model()
    found = evaluate(model, make_envs(4, reference=model), episodes=16)
    for row in found.tokens:
        for who in ("policy", "reference"):
            assert row[who]["numbers"]["ratio"] == pytest.approx([1.0] * len(row[who]["pieces"]), abs=1e-4)
            assert row[who]["numbers"]["kl"] == pytest.approx([0.0] * len(row[who]["pieces"]), abs=1e-4)
        assert row["policy"]["pieces"] == row["reference"]["pieces"]


def test_a_ratio_without_bounds_is_still_a_number_that_a_file_holds(tmp_path):
    task = make_envs(1).task
    rollout = make_rollout(random_model(), [[0]], [[1, 2]])
    rollout = replace(rollout, ref_logp=torch.tensor([[-500.0, 0.0]]))
    (row,) = token_rows(task, rollout)
    assert row["numbers"]["kl"] == [500.0, 0.0] and row["numbers"]["ratio"][0] > 1e38
    write_jsonl(tmp_path / "tokens.jsonl", [row])


def test_without_a_reference_there_is_none_beside_the_policy():
    found = evaluate(random_model(), make_envs(4, reference=None, beta=0.0), episodes=4)
    assert not {"kl", "win_rate"} & found.metrics.keys()
    assert not any(name.startswith("reference_") for name in [*found.metrics, *found.samples[0]])
    assert [set(row) for row in found.tokens] == [{"prompt", "policy"}] * 4
    assert found.best_of == []


# --- best of n -------------------------------------------------------------------------------------


def test_best_of_n_path_by_brute_force():
    """Five draws for each of two prompts: the gold of the best by score, over all subsets of each size."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.4], [5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    gold = torch.tensor([[1.0, 9.0, -3.0, 2.0, 0.0], [0.0, 1.0, 5.0, 0.5, 7.0]], dtype=torch.float64)
    rows = best_of_n_path(scores, gold)
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert [row["n"] for row in best_of_n_path(scores, most=2)] == [1, 2]
    for row in rows:
        n, expected = int(row["n"]), {"score": [], "gold": []}
        for s, g in zip(scores.tolist(), gold.tolist(), strict=True):
            best = [max(subset, key=s.__getitem__) for subset in combinations(range(5), n)]
            expected["score"].append(sum(s[i] for i in best) / math.comb(5, n))
            expected["gold"].append(sum(g[i] for i in best) / math.comb(5, n))
        for name, (first, second) in expected.items():
            assert row[name] == pytest.approx((first + second) / 2)
            half = 12.706205 * abs(first - second) / 2  # t of one degree of freedom · s / √2
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((row[name] - half, row[name] + half))
    assert rows[0]["score"] == pytest.approx(float(scores.mean())) and rows[0]["gold"] == pytest.approx(2.25)
    kl = [0.0, math.log(2) - 1 / 2, math.log(4) - 3 / 4]
    assert [row["kl_bound"] for row in rows] == pytest.approx(kl)
    assert not any("gold" in name for row in best_of_n_path(scores) for name in row)


def test_the_best_of_n_draws_is_the_policys_response():
    """Each prompt is drawn n times in a row; the first of the highest score stays, and the rest as for one draw."""
    policy, prompts, n = random_model(seed=1), list(PROMPTS), 5
    coarse = lambda prompts, responses: [min(r.count("a"), 1) for r in responses]  # noqa: E731 (many equals)
    envs = make_envs(4, reward_model=coarse)
    gold = lambda prompts, responses: [float(len(r)) for r in responses]  # noqa: E731
    drawn = collect(policy, envs, [prompt for prompt in prompts for _ in range(n)], seed=2)
    best = [max(range(i * n, i * n + n), key=lambda row: (drawn.score[row].item(), -row)) for i in range(len(prompts))]
    found = evaluate(policy, envs, prompts, seed=2, gold=gold, best_of=n)
    letters = [
        "".join(ALPHABET[t] for t in drawn.response_ids[row][drawn.response_mask[row]].tolist() if t < 8)
        for row in best
    ]
    assert [row["response"] for row in found.samples] == letters
    assert [row["prompt"] for row in found.samples] == prompts
    assert found.metrics["score"] == pytest.approx(drawn.score[best].mean().item())
    assert found.metrics["gold"] == pytest.approx(np.mean([len(text) for text in letters]))
    assert found.metrics["length"] == pytest.approx(drawn.lengths[best].float().mean().item())
    assert found.metrics["kl_bound"] == pytest.approx(math.log(5) - 4 / 5)
    assert not any(name in ("kl", "kl_k2", "kl_k3", "kl_full") for name in [*found.metrics, *found.samples[0]])
    reference = {name: value for name, value in found.metrics.items() if name.startswith("reference_")}
    assert reference == {
        k: v for k, v in evaluate(policy, envs, prompts, seed=2, gold=gold).metrics.items() if k in reference
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluateConfig:
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    random_model(seed=1).save_pretrained(folder / "trained")
    return EvaluateConfig(
        policy=str(folder / "trained"),
        prompts=str(folder / "prompts.txt"),
        reward="tests.builders:letter_score",
        gold="tests.builders:letter_score",
        reference=str(folder / "policy"),
        episodes=6,
        best_of=8,
        env=EnvConfig(max_new_tokens=4),
    )


def test_an_evaluation_leaves_its_numbers_and_best_of_n_in_its_folder(config, tmp_path):
    told = []
    found = run_evaluation(config, tmp_path / "out", progress=lambda more, of: told.append((more, of)))
    run = Run.open(tmp_path / "out")
    assert build(EvaluateConfig, read_layer(run.path / "config.yaml")) == config
    assert run.summary.items() >= found.metrics.items() and run.summary["best_of"] == found.best_of
    assert (run.summary["episodes"], run.summary["prompts"]) == (6, 4)
    assert (run.samples, run.tokens) == (found.samples, found.tokens)
    assert [row["n"] for row in found.best_of] == [1, 2, 4, 8]
    assert sum(more for more, _ in told) == 6 + 6 + 4 * 8 and {of for _, of in told} == {44}
    best = found.best_of
    assert [row["score"] for row in best] == sorted(row["score"] for row in best)
    assert [row["gold"] for row in best] == pytest.approx([row["score"] for row in best])  # here gold is the score
    assert best[0]["score"] != pytest.approx(found.metrics["reference_score"])  # drawn anew, four prompts of eight


def test_best_of_n_is_of_the_references_draws_for_each_prompt(config):
    reference, envs = random_model(), make_envs(3, reference=None, beta=0.0, max_new_tokens=4)
    drawn = [prompt for prompt in PROMPTS for _ in range(8)]
    scores = collect(reference, envs, drawn, seed=BEST_OF_SEED).score.reshape(4, 8)
    best = run_evaluation(config).best_of
    assert best[0]["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert best[-1]["score"] == pytest.approx(scores.max(1).values.mean().item(), abs=1e-5)


def test_the_seed_decides_and_the_number_of_environments_does_not(config):
    one, same = run_evaluation(config), run_evaluation(replace(config, num_envs=3))
    assert [row["response"] for row in one.samples] == [row["response"] for row in same.samples]
    assert one.best_of == [pytest.approx(row) for row in same.best_of]
    other = run_evaluation(replace(config, seed=1))
    assert [row["response"] for row in one.samples] != [row["response"] for row in other.samples]
    assert one.best_of != other.best_of


def test_one_response_to_each_prompt_where_no_number_is_given(config):
    found = run_evaluation(replace(config, episodes=None, best_of=0))
    assert [row["prompt"] for row in found.samples] == list(PROMPTS) and found.best_of == []


def test_greedy_evaluation_claims_no_kl(config):
    found = run_evaluation(replace(config, greedy=True, seed=1, best_of=0))
    assert "kl" not in found.metrics
    again = run_evaluation(replace(config, greedy=True, seed=1, best_of=0, num_envs=2))
    assert [row["response"] for row in found.samples] == [row["response"] for row in again.samples]


def test_what_an_evaluation_lacks_is_said_and_leaves_no_folder(config, tmp_path):
    with pytest.raises(ConfigError, match="give a reference, or best_of=0"):
        replace(config, reference=None)
    for change, message in (
        ({"prompts": "no.txt"}, "No such file"),
        ({"policy": "./none"}, "there is no folder"),
        ({"text": "no-text.txt"}, "no-text.txt: No such file"),
        ({"gold": "vadr"}, "Did you mean 'vader'"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            run_evaluation(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- responses alone -------------------------------------------------------------------------------


def test_generated_responses_are_those_of_the_evaluation_without_its_scores(config):
    found = run_evaluation(replace(config, episodes=None, best_of=0))
    written = generate(GenerateConfig(policy=config.policy, prompts=config.prompts, env=config.env))
    assert [row["response"] for row in written] == [row["response"] for row in found.samples]
    assert [row["length"] for row in written] == [row["length"] for row in found.samples]
    for row in written:
        assert set(row) == {"prompt", "response", "length", "ended"}
        assert row["ended"] or row["length"] == 4
    (one,) = generate(GenerateConfig(policy=config.policy, prompt=PROMPTS[0], env=config.env))
    assert one == written[0]
