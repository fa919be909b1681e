"""The evaluation of a reward model, as a whole: what it finds, what it leaves, what it says."""

import json

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.records.run import Run
from rlhf_env.reward_models import Ensemble, VaderReward
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.training.config import EnvConfig, NewModelConfig, RewardConfig, RewardEvalConfig
from rlhf_env.training.reward import run_reward
from rlhf_env.training.reward_card import defects, reward_card
from rlhf_env.training.reward_eval import disagreement, measure_draws, review_rankings, run_reward_eval
from rlhf_env.types import Comparison
from tests.builders import ALPHABET
from tests.reward_models.test_load import save_classifier
from tests.tiny_files import write_letter_files, write_rows


def length(prompts, responses):
    return [len(response) for response in responses]


def count_of_a(prompts, responses):
    return [response.count("a") for response in responses]


def constant(prompts, responses):
    return [3.0] * len(responses)


HERE = "tests.training.test_reward_eval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pairs of random letters; the one with more letters a is preferred, by two labelers."""
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    rng, found = np.random.default_rng(0), []
    while len(found) < 40:
        first, second = ("".join(rng.choice(list(ALPHABET), int(rng.integers(4, 9)))) for _ in range(2))
        if lead := first.count("a") - second.count("a"):
            ranks = (0, 1) if lead > 0 else (1, 0)
            found.append(Comparison(f"{len(found)} ", (first, second), ranks, labeler=f"labeler {len(found) % 2}"))
    write_comparisons(folder / "comparisons.jsonl", found)
    return folder


def config(folder, **settings):
    given = {"reward": f"{HERE}:count_of_a", "comparisons": str(folder / "comparisons.jsonl")} | settings
    return RewardEvalConfig(**given)


def on_policy(folder, **settings):
    drawn = {"policy": str(folder / "policy"), "prompts": str(folder / "prompts.txt"), "best_of": 4}
    return config(folder, env=EnvConfig(max_new_tokens=6), num_envs=8, **drawn | settings)


def test_a_perfect_reward(folder):
    summary = run_reward_eval(config(folder, gold=f"{HERE}:count_of_a", label_temperature=0.0, suite="generated"))
    for name in ("accuracy", "gold_accuracy", "label_agreement", "expected_agreement"):
        assert summary[name] == 1
    assert [row["accuracy"] for row in summary["by_labeler"]] == [1, 1]
    assert {row["subset"]: row["accuracy"] for row in summary["suite"]["subsets"]}["better-over-worse"] == 1


def test_a_constant_reward_is_measured_as_far_as_it_can_be(folder):
    summary = run_reward_eval(on_policy(folder, reward=f"{HERE}:constant", suite="generated", gold=f"{HERE}:length"))
    assert (summary["accuracy"], summary["suite"]["score"], summary["score_std"]) == (0.5, 0.5, 0)
    policy = summary["policy"]
    assert (policy["variance"], policy["flat_prompts"]) == (0, 1) and not {"variance_share", "correlation"} & {*policy}
    assert "probes" not in summary
    assert "It scores all of the policy's responses alike on 100% of the prompts." in list(defects(summary))


def test_what_it_leaves(folder, tmp_path):
    settings = on_policy(folder, reward=f"{HERE}:length", gold=f"{HERE}:count_of_a", suite="generated")
    out = tmp_path / "out"
    summary = run_reward_eval(settings, out)
    run = Run.open(out)
    assert run.finished and run.summary == json.loads(json.dumps(summary))
    assert run.config["reward"] == f"{HERE}:length"
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in ("## Defects", "accuracy against gold", "| padding |", "own-over-foreign", "variance of the score"):
        assert text in card
    assert (out / "plots" / "reliability.png").is_file() == ("plots/reliability.png" in card)
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        run_reward_eval(settings, out)


def test_the_same_seed_gives_the_same_numbers(folder):
    first, again = (run_reward_eval(on_policy(folder, suite="generated")) for _ in range(2))
    for summary in (first, again):
        del summary["seconds"]
    assert first == again


def test_a_learned_reward_model_is_measured_by_its_logits_and_told_what_it_learned_from(folder, tmp_path):
    learning = RewardConfig(
        str(folder / "comparisons.jsonl"),
        held_out=0.5,
        fit=BradleyTerryConfig(learning_rate=1e-2, epochs=2),
        new=NewModelConfig(tokenizer="byte", n_layer=1, n_embd=16, n_head=2, n_positions=32),
    )
    trained = run_reward(learning, tmp_path / "reward")
    summary = run_reward_eval(config(folder, reward=str(tmp_path / "reward" / "model"), probes=8))
    assert {"log_loss", "ece", "margin", "reliability"} <= summary.keys()
    # The pairs held out and those learned from, together: so the two losses enclose this one, or are it.
    bounds = sorted([trained["log_loss"], trained["loss_learned"]])
    assert bounds[0] - 1e-6 <= summary["log_loss"] <= bounds[1] + 1e-6
    assert summary["origin"]["same_file"] and summary["origin"]["learned_from"].endswith("comparisons.jsonl")
    assert "It has learned from most of these comparisons" in next(defects(summary))


def test_a_suite_from_a_file(folder, tmp_path):
    row = {"prompt": "p", "chosen": "aaa", "rejected": ["a", "b"], "subset": "mine", "section": "ours"}
    summary = run_reward_eval(config(folder, suite=write_rows(tmp_path / "suite.jsonl", row), probes=0))
    assert summary["suite"]["sections"] == [{"section": "ours", "score": 1}] and "probes" not in summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "x"}, "give both policy and prompts, or neither"),
        ({"label_temperature": 1.0}, "gold that must be given"),
        ({"label_flip_rate": 0.1, "gold": "vader"}, "gold that must be given"),
        ({"label_temperature": -1.0, "gold": "vader"}, "temperature must be at least 0"),
        ({"best_of": 1}, "best_of must be at least 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardEvalConfig("vader", "pairs.jsonl", **settings)


def test_ties_alone_say_little_and_break_nothing(tmp_path):
    row = {"prompt": "p", "responses": ["aa", "b"], "ranks": [0, 0]}
    settings = RewardEvalConfig(f"{HERE}:length", write_rows(tmp_path / "ties.jsonl", row), suite="generated")
    summary = run_reward_eval(settings, tmp_path / "out")
    assert "accuracy" not in summary and summary["suite"] == {"subsets": [], "sections": []}
    assert (summary["pairs"], summary["ties"]) == (1, 1)


def test_a_score_among_several_labels_is_no_logit(folder, tmp_path):
    save_classifier(tmp_path / "two", labels=2)
    summary = run_reward_eval(config(folder, reward=f"{tmp_path / 'two'}:LABEL_1", probes=0))
    assert "log_loss" not in summary and "accuracy" in summary


def test_comparisons_of_nothing(tmp_path):
    file = write_rows(tmp_path / "same.jsonl", {"prompt": "p", "chosen": "x", "rejected": "x"})
    with pytest.raises(DataError, match="of 1 comparisons none has responses that differ"):
        run_reward_eval(RewardEvalConfig("vader", file))


# --- draws of a policy -----------------------------------------------------------------------------


def test_draws_by_hand():
    """Scores 1, 3 and 2, 2: variances 2 and 0; the best of two is 3 and 2, with gold 0 and (either) 1."""
    texts = [("a", "aaa"), ("bb", "cc")]
    gold = {"a": 1.0, "aaa": 0.0, "bb": 1.0, "cc": 1.0}
    found = measure_draws(length, ["p", "q"], texts, lambda prompts, responses: [gold[r] for r in responses])
    assert (found["score"], found["variance"], found["flat_prompts"]) == (2, 1, 0.5)
    assert found["variance_share"] == 1  # the two prompts have the same mean
    assert [(row["n"], row["score"], row["gold"]) for row in found["best_of"]] == [(1, 2, 0.75), (2, 2.5, 0.5)]
    assert (found["accuracy"], found["accuracy_pairs"]) == (0, 1)  # gold ties the others
    assert found["correlation"] == pytest.approx(-1 / np.sqrt(2 * 0.75))


def test_how_far_members_differ_by_hand():
    """To one "a" and "bbb" are −1 and 1, to the other 1 and −1: deviation 1. And "bbbbb" is 3 and −1: deviation 2."""
    known = [Comparison("p", ("a", "bbb"), (1, 0))]
    found = disagreement(Ensemble([length, count_of_a]), known, ["p", "q"], [("bbbbb",), ("bbbbb",)])
    assert found == {"deviation_compared": 1, "deviation_drawn": 2, "deviation_ratio": 2}


def test_members_without_a_scale_are_left_out():
    known = [Comparison("p", ("a", "bbb"), (1, 0))]
    assert disagreement(Ensemble([length, constant]), known, ["p"], [("a", "b")]) == {}


def test_members_that_always_agree_on_what_is_known_have_no_ratio():
    known = [Comparison("p", ("a", "aaa"), (1, 0))]
    found = disagreement(Ensemble([length, count_of_a]), known, ["p"], [("bb",)])
    assert found == {"deviation_compared": 0, "deviation_drawn": 1}  # 0 and −2


def test_an_ensemble_on_a_policy(folder):
    summary = run_reward_eval(on_policy(folder, reward=f"{HERE}:length,{HERE}:count_of_a", probes=0))
    assert summary["policy"]["deviation_ratio"] > 0


# --- built-in reviews, hostile names ---------------------------------------------------------------


def test_the_built_in_reviews_are_ranked_by_gold():
    found = review_rankings(VaderReward())
    assert len(found) > 900 and {len(c.responses) for c in found} == {4}
    scores = VaderReward().score([""] * 4, found[0].responses)
    assert [found[0].ranks[i] for i in np.argsort(-scores, kind="stable")] == sorted(found[0].ranks)


def test_names_out_of_files_stay_text_in_the_card(folder, tmp_path):
    evil = "</table><img src=x> | [click](javascript:alert(1)) `*_\x1b[2J\n# title ~~x $y https://e www.e.org a@e.org"
    rows = [
        {"prompt": f"{i}", "responses": ["aa", "b"], "ranks": [i % 2, 1 - i % 2], "labeler": (evil, "other")[i % 2]}
        for i in range(60)
    ]
    suite = write_rows(tmp_path / "s.jsonl", {"prompt": "p", "chosen": "b", "rejected": "a", "subset": evil})
    settings = config(folder, comparisons=write_rows(tmp_path / "evil.jsonl", *rows), suite=suite)
    card = reward_card(settings, run_reward_eval(settings), figure=False)
    assert "\x1b" not in card and "\n# title" not in card
    assert "www\\.e" in card and "www.e" not in card  # GitHub makes links of bare addresses
    for raw in ("<img", "](java", " | [", "~x", "$y", "://e", "@e"):
        assert all(line.count(raw) == line.count("\\" + raw.lstrip()) for line in card.splitlines() if raw in line), raw


def test_the_command_prints_tables_and_defects(command, folder, tmp_path):
    code, shown, err = command(
        "reward-eval", "--reward", f"{HERE}:length", "--comparisons", folder / "comparisons.jsonl",
        "--suite", "generated", "--out", tmp_path / "out", "probes=16",
    )  # fmt: skip
    assert code == 0, err
    for text in ("40 comparisons", "accuracy on the labels", "padding", "better-over-worse", "defect: It likes length"):
        assert text in shown
    code, _, err = command("reward-eval", "--reward", "vader", "--comparisons", folder / "nothing.jsonl")
    assert code == 1 and "nothing.jsonl" in err


def test_real_comparisons(shared_data):
    """VADER on hh-rlhf: people did not choose by sentiment, and the model is fooled by polite words."""
    file = shared_data / "preferences" / "hh_harmless_base.jsonl"
    summary = run_reward_eval(RewardEvalConfig("vader", str(file), probes=64))
    assert summary["comparisons"] == 1807 and summary["accuracy_high"] < 0.5
    assert {row["probe"]: row["raised"] for row in summary["probes"]}["praise"] > 0.9
