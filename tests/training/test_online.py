"""The online loop: what its stages are connected by, what is counted and measured, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_env.errors import ConfigError, DataError, RLHFEnvError
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.preferences.queries import select
from rlhf_env.records.run import Run
from rlhf_env.reward_models import ClassifierReward
from rlhf_env.settings import LabelerConfig
from rlhf_env.training import querying
from rlhf_env.training.config import EnvConfig, OnlineConfig, TrainConfig
from rlhf_env.training.labeler_config import MemberConfig
from rlhf_env.training.online import plan, round_cells, run_online
from tests.builders import letter_score
from tests.tiny_files import write_letter_files
from tests.tiny_pipeline import left_in

STAGES = ["pool", "labels", "reward-0", "reward-1", "ensemble", "train"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> OnlineConfig:
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    return OnlineConfig(
        policy=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        eval_prompts=str(folder / "prompts.txt"),
        gold="tests.builders:letter_score",
        rounds=2,
        comparisons=30,
        initial=0.5,
        pool=18,
        candidates=3,
        members=2,
        num_envs=8,
        env=EnvConfig(max_new_tokens=4),
        reward={"normalize_on": 32, "fit": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8}},
        train={
            "updates": 5,
            "checkpoint_every": 1,
            "eval_episodes": 8,
            "settings": {"batch_size": 8, "epochs": 1, "learning_rate": 1e-2},
        },
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Run:
    """The loop without interruption."""
    out = tmp_path_factory.mktemp("loops") / "straight"
    run_online(config, out)
    return Run.open(out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the plan


def test_each_round_starts_from_what_the_last_one_left(config):
    stages = {stage.name: stage.config for stage in plan(config, Path("out"))}
    assert list(stages) == [f"round-{number}/{name}" for number in (0, 1) for name in STAGES]
    pool, labels, first, second, ensemble, train = (stages[f"round-1/{name}"] for name in STAGES)
    present = "out/round-0/reward-0/model,out/round-0/reward-1/model"
    assert pool.policy == labels.policy == train.policy == "out/round-0/train/model"
    assert pool.ensemble == present
    assert (labels.pool, labels.earlier) == ("out/round-1/pool/pool.jsonl", "out/round-0/labels/all.jsonl")
    assert {m.comparisons for m in (first, second)} == {"out/round-1/labels/learned.jsonl"}
    assert (
        {m.eval_comparisons for m in (first, second)} == {ensemble.comparisons} == {"out/round-1/labels/held_out.jsonl"}
    )
    assert ensemble.ensemble == train.reward == present.replace("round-0", "round-1")
    begun = stages["round-0/pool"], stages["round-0/labels"], stages["round-0/train"]
    assert {stage.policy for stage in begun} == {config.policy} and begun[0].ensemble is begun[1].earlier is None
    # The reference, in whose responses scores are normalised and to which KL is measured, is always the first policy.
    assert {m.reference for m in (first, second, train, begun[2])} == {config.policy}
    assert {m.body for m in (first, second)} == {config.policy}  # learned from scratch


def test_labels_budget_and_positions_are_shared_among_the_rounds(config):
    three = replace(config, rounds=3, comparisons=40, pool=20, schedule="hyperbolic")
    stages = {stage.name: stage.config for stage in plan(three, Path("out"))}
    labels = [stages[f"round-{number}/labels"] for number in range(3)]
    assert [each.count for each in labels] == [20, 13, 7]  # 20, then 20 in proportion to 1 and 1/2
    assert [each.first for each in labels] == [0, 20, 33]
    assert [each.rule for each in labels] == ["uniform", "bald", "bald"]  # at first there is no ensemble to ask
    assert [stages[f"round-{number}/pool"].start for number in range(3)] == [0, 20, 40]
    assert [stages[f"round-{number}/train"].updates for number in range(3)] == [2, 2, 1]


def test_every_member_and_round_has_random_numbers_of_its_own(config):
    learned = [s.config for s in plan(config, Path("out")) if "/reward-" in s.name or s.name.endswith("/train")]
    assert len({each.seed for each in learned}) == len(learned) == 6
    assert all(each.bagging for each in learned if not isinstance(each, TrainConfig))
    alone = [s.config for s in plan(replace(config, members=1, rule="entropy"), Path("out")) if "/reward-" in s.name]
    assert len(alone) == 2 and not any(each.bagging for each in alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": 14}, "asks about 15 pairs, at most one of each prompt of the pool, which has 14: raise pool"),
        ({"initial": 0.04}, "the first round asks about 1 pair, but needs one to learn from and one to measure on"),
        ({"rounds": 20}, "leave a round without any"),
        ({"train": {"updates": 1}}, "train's budget of 1 updates is that of all rounds together, and there are 2"),
        (
            {"train": {"seed": 3}},
            "train.seed is what the loop connects .* the loop's setting for it is seed",
        ),
        ({"train": {"data": "x.jsonl"}}, "train.data is what the loop connects its stages by"),
        ({"train": {"update": 3}}, "the loop's settings: there is no setting train.update; did you mean train.updates"),
        ({"reward": {"held_out": 0.2}}, "reward.held_out is what .* the loop's setting for it is held_out"),
        ({"reward": {"reference": "x"}}, "reward.reference is what the loop connects"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        plan(replace(config, **change), Path("out"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gold": "vadr"}, ConfigError, "unknown reward model 'vadr'"),
        ({"biases": {"log_word": 1.0}}, ConfigError, "'log_word' is no bias: choose among log_words"),
        ({"labelers": (MemberConfig(gold="vadr"),)}, ConfigError, "unknown reward model 'vadr'"),
        ({"labelers": (MemberConfig(weight=0.0),)}, ConfigError, "weights of labelers must be"),
        ({"policy": "./nowhere"}, ConfigError, "there is no folder ./nowhere"),
        ({"prompts": "none.txt"}, DataError, r"none\.txt: No such file"),
        ({"device": "abacus"}, ConfigError, "device 'abacus' cannot be used"),
        ({"env": EnvConfig(max_new_tokens=1000)}, RLHFEnvError, "exceed the model's context"),
        ({"reward": {"body": "./nowhere"}}, ConfigError, "there is no folder ./nowhere"),
        ({"reward": {"kind": "steps"}}, ConfigError, "steps learns from files of its own"),
        ({"train": {"agent": "pppo"}}, ConfigError, "unknown agent 'pppo'"),
        ({"train": {"agent": "dpo"}}, ConfigError, "dpo samples nothing: it needs data"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_written(config, change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_online(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"members": 0}, {"candidates": 1}, {"keep": 1}, {"initial": 1.0}, {"held_out": 0.0}]
)
def test_settings_have_limits(config, change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelers": (MemberConfig(),), "biases": {"log_words": 1.0}}, "one labeler .* or several"),
        ({"overlap": 2}, "overlap is 2, but there are 1 labelers"),
        ({"labelers": (MemberConfig(),) * 4, "overlap": 4}, "answered 4 times, and 30 labels .* multiple of overlap"),
    ],
)
def test_who_cannot_label_together_is_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("rule", ["disagreement", "bald", "double_thompson"])
def test_one_member_has_nobody_to_disagree_with(config, rule):
    with pytest.raises(ConfigError, match=f"{rule} goes by what the members disagree on, .*: raise members, or choose"):
        replace(config, members=1, rule=rule)
    assert replace(config, members=1, rule=rule, rounds=1).members == 1  # the only round has no ensemble to ask
    assert replace(config, members=1, rule="entropy").members == 1  # how sure one is needs no other


def test_a_comma_in_the_folder_would_divide_the_ensemble(config):
    with pytest.raises(ConfigError, match="has a comma, which stands between the members"):
        plan(config, Path("a,b"))


# --- a whole loop


def test_a_pool_has_the_responses_and_what_every_member_says_of_them(config, straight):
    rows = rows_of(straight.path / "round-1/pool/pool.jsonl")
    assert len(rows) == 18 and all(len(row["responses"]) == 3 for row in rows)
    for m in range(2):
        model = ClassifierReward(straight.path / f"round-0/reward-{m}/model")
        said = model.logits([row["prompt"] for row in rows], [row["responses"][2] for row in rows])
        np.testing.assert_allclose([row["logits"][m][2] for row in rows], said, atol=1e-5)
    first = rows_of(straight.path / "round-0/pool/pool.jsonl")
    assert not any("logits" in row for row in first)
    assert [row["responses"] for row in first] != [row["responses"] for row in rows]


def test_a_pool_begins_where_the_one_before_it_ended(config, straight, tmp_path):
    stage = next(s for s in plan(config, straight.path) if s.name == "round-0/pool").config
    querying.run_pool(replace(stage, start=18), tmp_path / "second")
    querying.run_pool(replace(stage, size=36), tmp_path / "both")
    both = rows_of(tmp_path / "both/pool.jsonl")
    assert rows_of(tmp_path / "second/pool.jsonl") == both[18:]
    assert rows_of(straight.path / "round-0/pool/pool.jsonl") == both[:18]


def test_what_is_asked_are_the_pairs_that_the_rule_chooses(straight):
    rows = rows_of(straight.path / "round-1/pool/pool.jsonl")
    asked = read_comparisons(straight.path / "round-1/labels/comparisons.jsonl")
    distinct = [[[a != b for b in row["responses"]] for a in row["responses"]] for row in rows]
    scores = np.array([row["logits"] for row in rows]).swapaxes(0, 1)
    chosen = select("bald", scores, 15, np.random.default_rng(0), distinct)
    # Texts, not places: two responses to a prompt may be the same, and chance decides which of them is asked about.
    expected = [(rows[n]["prompt"], {rows[n]["responses"][i], rows[n]["responses"][j]}) for n, i, j in chosen]
    assert [(c.prompt, set(c.responses)) for c in asked] == expected
    assert all(c.responses[0] != c.responses[1] for c in asked)


def test_the_ensemble_is_measured_on_new_pairs_before_it_learns_them(straight):
    """By hand: how often the mean of the members' logits prefers what the labeler preferred."""
    asked = read_comparisons(straight.path / "round-1/labels/comparisons.jsonl")
    models = [ClassifierReward(straight.path / f"round-0/reward-{m}/model") for m in range(2)]
    leads = [
        np.mean([np.subtract(*model.logits([c.prompt] * 2, list(c.responses))) for model in models]) for c in asked
    ]
    preferred = [1 if c.ranks[0] < c.ranks[1] else -1 for c in asked]
    right = np.mean(np.sign(leads) == preferred)
    loss = np.mean([np.log1p(np.exp(-lead * y)) for lead, y in zip(leads, preferred, strict=True)])
    row = rows_of(straight.path / "rounds.jsonl")[1]
    assert row["accuracy_new_pairs"] == pytest.approx(right) and row["log_loss_new_pairs"] == pytest.approx(
        loss, rel=1e-4
    )
    assert row["accuracy_new_pairs_low"] < right < row["accuracy_new_pairs_high"]


def test_members_are_asked_once_about_what_is_in_the_pool(config, straight, tmp_path, monkeypatch):
    """Choosing pairs, and measuring the ensemble on the pool and on new pairs, needs the logits of the pool alone."""
    asked = []

    def each(self, prompts, responses):
        asked.append(len(responses))
        return np.array([[len(text) * (m + 1) for text in responses] for m in range(2)], dtype=float)

    monkeypatch.setattr(querying.Members, "each", each)
    stages = {stage.name: stage.config for stage in plan(config, straight.path)}
    pool = querying.run_pool(stages["round-1/pool"], tmp_path / "pool")
    labels = replace(stages["round-1/labels"], pool=str(tmp_path / "pool/pool.jsonl"))
    summary = querying.run_labels(labels, tmp_path / "labels")
    assert asked == [18 * 3] and 0 <= pool["accuracy_pool"] <= 1
    new = read_comparisons(tmp_path / "labels/comparisons.jsonl")
    lead = np.array([(len(c.responses[0]) - len(c.responses[1])) * (c.ranks[1] - c.ranks[0]) for c in new])
    assert summary["accuracy_new_pairs"] == pytest.approx(np.mean(0.5 + 0.5 * np.sign(lead)))
    assert summary["log_loss_new_pairs"] == pytest.approx(np.mean(np.log1p(np.exp(-1.5 * lead))))  # of the mean logit


def test_the_accuracy_on_the_pool_is_that_of_all_pairs_by_gold(straight):
    rows = rows_of(straight.path / "round-1/pool/pool.jsonl")
    right, of_rows = [], 0
    for row in rows:
        gold, said = letter_score([row["prompt"]] * 3, row["responses"]), np.mean(row["logits"], axis=0)
        pairs = [(i, j) for i, j in ((0, 1), (0, 2), (1, 2)) if gold[i] != gold[j]]
        right += [0.5 + 0.5 * np.sign((gold[i] - gold[j]) * (said[i] - said[j])) for i, j in pairs]
        of_rows += bool(pairs)
    assert Run(straight.path / "round-1/pool").summary["accuracy_pool"] == pytest.approx(np.mean(right), abs=1e-9)


def test_what_is_learned_from_is_never_measured_on(straight):
    for number, count in ((0, 15), (1, 30)):
        learned, held_out, every = (
            read_comparisons(straight.path / f"round-{number}/labels/{name}.jsonl")
            for name in ("learned", "held_out", "all")
        )
        assert len(learned) + len(held_out) == len(every) == count
        assert not {c.prompt for c in learned} & {c.prompt for c in held_out}
        for m in range(2):
            summary = Run(straight.path / f"round-{number}/reward-{m}").summary
            assert (summary["comparisons"], summary["held_out"]) == (len(learned), len(held_out))
    new = read_comparisons(straight.path / "round-1/labels/comparisons.jsonl")
    assert every[15:] == new and every[:15] == read_comparisons(straight.path / "round-0/labels/all.jsonl")


def test_rounds_and_summary_say_what_the_stages_say(config, straight):
    rows, summary = rows_of(straight.path / "rounds.jsonl"), straight.summary
    assert [row["round"] for row in rows] == [0, 1]
    for row in rows:
        said = {name: Run(straight.path / f"round-{row['round']}" / name).summary for name in STAGES}
        assert row["asked"] == row["kept"] == said["labels"]["kept"] == 15 and row["skipped"] == 0
        for name, stage, source in [
            ("accuracy_held_out", "ensemble", "accuracy"),
            ("gold_before", "train", "gold_before"),
            ("gold_after", "train", "gold_after"),
            ("proxy_after", "train", "score_after"),
            ("kl", "train", "kl"),
            ("label_agreement", "labels", "label_agreement"),
        ]:
            for end in ("", "_low", "_high"):
                assert row[name + end] == said[stage][source + end], name + end
    assert rows[0]["gold_after"] == rows[1]["gold_before"]  # the same policy, prompts and random numbers
    assert "accuracy_new_pairs" not in rows[0]
    for name, value in [("gold_before", rows[0]), ("gold_after", rows[1]), ("kl", rows[1])]:
        assert summary[name] == value[name]
    assert (summary["asked"], summary["kept"], summary["updates"]) == (30, 30, 5)
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert (straight.path / summary["policy"] / "config.json").is_file()
    card = (straight.path / "README.md").read_text(encoding="utf-8")
    assert all(cells[1] in card for cells in round_cells(rows).values())


def test_the_kl_is_that_to_the_first_policy(config, straight):
    trained = Run(straight.path / "round-1/train")
    assert trained.config["reference"] == config.policy
    assert trained.summary["kl_before"] == pytest.approx(Run(straight.path / "round-0/train").summary["kl"], abs=1e-4)


# --- labels that are not to be had


def test_a_label_that_is_not_given_is_counted_as_asked_and_not_kept(config, straight, tmp_path, monkeypatch):
    ask = querying.ask

    def sometimes(*args, **kwargs):
        return [c for number, c in enumerate(ask(*args, **kwargs)) if number % 3]

    monkeypatch.setattr(querying, "ask", sometimes)
    stage = next(s for s in plan(config, straight.path) if s.name == "round-0/labels")
    summary = querying.run_labels(stage.config, tmp_path / "labels")
    assert (summary["planned"], summary["asked"], summary["skipped"], summary["kept"]) == (15, 15, 5, 10)
    assert len(read_comparisons(tmp_path / "labels/comparisons.jsonl")) == 10
    monkeypatch.setattr(querying, "ask", lambda *args, **kwargs: [])
    with pytest.raises(DataError, match="of 18 prompts 15 had .* and 0 were answered"):
        querying.run_labels(stage.config, tmp_path / "none")


SHORT = MemberConfig(weight=3.0, biases={"log_words": -1.0}, labeler=LabelerConfig(temperature=0.0))
CONTRARY = MemberConfig(gold="tests.builders:letter_score", labeler=LabelerConfig(temperature=0.0, flip_rate=1.0))


def test_each_query_is_put_to_as_many_labelers_as_overlap_says(config, straight, tmp_path):
    """30 labels by two each are 15 pairs: 7 in the first round, 8 in the second."""
    several = replace(config, labelers=(SHORT, CONTRARY, MemberConfig()), overlap=2)
    first, second = (s.config for s in plan(several, straight.path) if s.name.endswith("/labels"))
    assert (first.count, first.first, second.count, second.first) == (7, 0, 8, 7)
    summary = querying.run_labels(first, tmp_path / "labels")
    assert (summary["planned"], summary["asked"], summary["skipped"], summary["kept"]) == (14, 14, 0, 14)
    comparisons = read_comparisons(tmp_path / "labels/comparisons.jsonl")
    for one, other in zip(comparisons[::2], comparisons[1::2], strict=True):
        assert (one.prompt, one.responses, one.order) == (other.prompt, other.responses, other.order)
        assert one.labeler != other.labeler
    theirs = [c for c in comparisons if c.labeler.startswith("1 ")]
    assert theirs and all("flip rate 1.0" in c.labeler for c in theirs)
    for c in theirs:  # the contrary one prefers, always, what gold does not
        gold = letter_score([c.prompt] * 2, list(c.responses))
        assert np.sign(gold[1] - gold[0]) == -np.sign(c.ranks[0] - c.ranks[1])


def test_who_labels_is_what_prefer_makes_of_the_same_settings(config, straight, tmp_path):
    """By name, which says gold, biases, errors and seed; and a bias against words reaches the answers."""
    biased = replace(config, biases={"log_words": -9.0}, labeler=LabelerConfig(temperature=0.0))
    stage = next(s.config for s in plan(biased, straight.path) if s.name == "round-0/labels")
    querying.run_labels(stage, tmp_path / "labels")
    comparisons = read_comparisons(tmp_path / "labels/comparisons.jsonl")
    wanted = "simulated: tests.builders:letter_score -9.0 log_words, temperature 0.0, flip rate 0.0, seed 0"
    assert {c.labeler for c in comparisons} == {wanted}
    words = [[len(r.split()) for r in c.responses] for c in comparisons]
    decided = [(c, n) for c, n in zip(comparisons, words, strict=True) if n[0] != n[1]]
    assert all((n[0] < n[1]) == (c.ranks[0] < c.ranks[1]) for c, n in decided)


def test_prompts_with_one_text_only_are_not_asked_about(config, straight, tmp_path):
    stage = next(s for s in plan(config, straight.path) if s.name == "round-0/labels")
    rows = rows_of(straight.path / "round-0/pool/pool.jsonl")
    same = [row | {"responses": ["a"] * 3} for row in rows[6:]]
    (tmp_path / "pool.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows[:6], *same]))
    summary = querying.run_labels(replace(stage.config, pool=str(tmp_path / "pool.jsonl")), tmp_path / "labels")
    assert summary["planned"] == 15 and summary["asked"] == summary["kept"] <= 6


def test_only_the_latest_comparisons_are_kept_where_so_many_are_wanted(config, straight, tmp_path):
    stage = next(s for s in plan(replace(config, keep=20), straight.path) if s.name == "round-1/labels")
    summary = querying.run_labels(stage.config, tmp_path / "labels")
    every = read_comparisons(tmp_path / "labels/all.jsonl")
    assert (summary["kept"], summary["comparisons"]) == (15, 20)
    assert every == read_comparisons(straight.path / "round-1/labels/all.jsonl")[10:]


# --- going on


class Killed(BaseException):
    """What no code catches."""


def test_interrupted_in_every_stage_it_becomes_the_loop_that_was_not(config, straight, tmp_path, monkeypatch):
    out, write_summary = tmp_path / "out", Run.write_summary
    begun: list[str] = []

    @contextmanager
    def watch(name, config):
        begun.append(name)
        yield lambda *args: None

    for name in [f"round-{number}/{stage}" for number in (0, 1) for stage in STAGES]:

        def write(run: Run, summary, name=name) -> None:
            if str(run.path).endswith(name):
                raise Killed
            write_summary(run, summary)

        monkeypatch.setattr(Run, "write_summary", write)
        begun.clear()
        with pytest.raises(Killed):
            run_online(config, out, watch=watch)
        assert begun[-1] == name and len(begun) <= 2  # the one that was killed before, and this one
        assert len(rows_of(out / "rounds.jsonl")) == int(name[6])
    monkeypatch.setattr(Run, "write_summary", write_summary)
    run_online(config, out)
    assert left_in(out) == left_in(straight.path)


def test_a_finished_loop_is_not_done_again_and_may_stand_elsewhere(config, straight, tmp_path):
    out = shutil.copytree(straight.path, tmp_path / "moved")
    before = {str(p): p.stat().st_mtime_ns for p in out.rglob("round-*/*/*")}
    summary = run_online(config, out)
    assert {k: v for k, v in summary.items() if k != "seconds"} == {
        k: v for k, v in straight.summary.items() if k != "seconds"
    }
    assert {str(p): p.stat().st_mtime_ns for p in out.rglob("round-*/*/*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rule": "entropy"},
            r"round-1/labels was begun with another rule; .* delete \S*/round-1/labels \S*/round-1/r",
        ),
        ({"comparisons": 31}, "round-1/labels was begun with another count"),
        ({"members": 1, "rule": "uniform"}, "holds round-0/reward-1, which these settings leave out"),
        ({"rounds": 1, "comparisons": 15}, "holds round-1/ensemble, which these settings leave out"),
        ({"seed": 1}, "round-0/pool was begun with another seed"),
    ],
)
def test_what_a_stage_was_done_with_cannot_change(config, straight, change, message):
    before = left_in(straight.path)
    with pytest.raises(ConfigError, match=message):
        run_online(replace(config, **change), straight.path)
    assert left_in(straight.path) == before


def test_a_folder_of_another_run_is_left_alone(config, straight):
    with pytest.raises(ConfigError, match="holds another run, not a loop: choose another folder"):
        run_online(config, straight.path / "round-0/train")
