"""Reward models made of others, from a YAML file: each kind is what Python makes, and every mistake has its place."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.reward_models.cache import Cached
from rlhf_env.reward_models.load import load_reward
from rlhf_env.reward_models.recipe import KINDS
from rlhf_env.reward_models.remote import RemoteConfig, RemoteReward
from rlhf_env.settings import HTTPConfig
from tests.reward_models.test_averaged import member
from tests.tiny_files import write_rows


def length(prompts, responses):
    return [len(r) for r in responses]


def asked(prompts, responses):
    return [len(p) for p in prompts]


def always(prompts, responses):
    return [1.0] * len(responses)


LENGTH, ASKED, ALWAYS = (f"{__name__}:{name}" for name in ("length", "asked", "always"))
TWO = {"members": [LENGTH, ASKED]}

#: A recipe of each kind, and what it says of "ccccccc" after "aaa": 7 and 3.
RECIPES = {
    "mean": (TWO, 5),
    "worst_case": (TWO, 3),
    "quantile": ({**TWO, "q": 0.25}, 4),
    "lower_bound": ({**TWO, "k": 0.5}, 4),  # the deviation of 7 and 3 is 2
    "sum": ({"parts": {"brief": {"reward": LENGTH, "weight": -2}, "asked": {"reward": ASKED}}}, -11),
    "rules": ({"preference": LENGTH, "rules": {"c": {"pattern": "c{7}", "weight": 2}, "x": {"broken": ALWAYS}}}, 4),
    "safety_first": ({"safety": ASKED, "helpfulness": LENGTH}, 7),
    "normalised": ({"reward": LENGTH, "mean": 3, "std": 2}, 2),
    "cached": ({"reward": LENGTH, "size": 10}, 7),
}


def write(folder, recipe, name="reward.yaml"):
    (folder / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(folder / name)


def test_every_kind_has_a_recipe_here():
    assert {*RECIPES, "remote", "weight_average", "by_step"} == set(KINDS)  # by_step: test_process.py


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_is_what_it_says(kind, tmp_path):
    settings, score = RECIPES[kind]
    reward = load_reward(write(tmp_path, {"kind": kind, **settings}))
    np.testing.assert_array_equal(scores_of(reward, ["aaa"], ["c" * 7]), [score])


def test_members_are_recipes_again_in_place_or_in_files_of_their_own(tmp_path):
    inner = {"kind": "sum", "parts": {"brief": {"reward": LENGTH, "weight": -1}}}
    file = write(tmp_path, inner, "inner.json")
    recipe = {"kind": "cached", "reward": {"kind": "worst_case", "members": [inner, file, f"{LENGTH}, {ASKED}"]}}
    reward = load_reward(write(tmp_path, recipe))
    assert isinstance(reward, Cached)
    np.testing.assert_array_equal(scores_of(reward, ["aaa"], ["c" * 7]), [-7])


def test_a_file_of_responses_normalises(tmp_path):
    rows = [{"prompt": "", "response": "a", "more": 1}, {"prompt": "", "response": "abcde"}]
    on = write_rows(tmp_path / "rows.jsonl", *rows)
    reward = load_reward(write(tmp_path, {"kind": "normalised", "reward": LENGTH, "on": on}))
    np.testing.assert_array_equal(scores_of(reward, [""], ["c" * 7]), [2])
    on = write_rows(tmp_path / "rows.jsonl", {"prompt": ""})
    with pytest.raises(DataError, match="rows.jsonl:1: the key 'response' is missing"):
        load_reward(write(tmp_path, {"kind": "normalised", "reward": LENGTH, "on": on}))


def test_a_tagged_prompt_is_found_by_its_pattern(tmp_path):
    recipe = {"kind": "safety_first", "safety": ASKED, "helpfulness": LENGTH, "tagged": "(?i)bomb"}
    reward = load_reward(write(tmp_path, recipe))
    np.testing.assert_array_equal(scores_of(reward, ["a Bomb", "a cake"], ["no", "yes"]), [6, 3])


def test_weights_of_folders_are_averaged_and_normalised(tmp_path):
    texts = ["a", "bcd", ""]
    rows = [{"prompt": "", "response": text} for text in texts]
    folders = [str(tmp_path / str(seed)) for seed in range(2)]
    for seed, folder in enumerate(folders):
        one = member(tmp_path / "m", seed)
        one.normalize_on([""] * 3, texts)
        one.save_pretrained(folder)
    recipe = {"kind": "weight_average", "members": folders}
    with pytest.raises(ConfigError, match="reward.yaml: a member is normalised"):
        load_reward(write(tmp_path, recipe))
    reward = load_reward(write(tmp_path, recipe | {"on": write_rows(tmp_path / "rows.jsonl", *rows)}))
    scores = scores_of(reward, [""] * 3, texts)
    assert scores.mean() == pytest.approx(0, abs=1e-6) and scores.std() == pytest.approx(1)
    with pytest.raises(ConfigError, match="each member is a folder"):
        load_reward(write(tmp_path, {"kind": "weight_average", "members": ["vader"]}))


def test_a_server_and_how_it_is_asked(tmp_path):
    assert load_reward("http://127.0.0.1:9/score") == RemoteReward("http://127.0.0.1:9/score")
    recipe = {"kind": "remote", "url": "http://127.0.0.1:9/score", "batch_size": 8, "http": {"attempts": 2}}
    expected = RemoteConfig(8, 4, HTTPConfig(attempts=2))
    assert load_reward(write(tmp_path, recipe)) == RemoteReward("http://127.0.0.1:9/score", expected)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kind": "meen", **TWO}, "there is no kind 'meen'; did you mean mean"),
        ({"kind": ["mean"], **TWO}, "there is no kind"),
        ({}, "a reward is a text as --reward takes it, or a mapping with a kind"),
        ({"kind": "mean", "membres": []}, "there is no setting membres; did you mean members"),
        ({"kind": "mean"}, "the setting members is missing"),
        ({"kind": "mean", "members": []}, "an ensemble has at least one member"),
        ({"kind": "mean", "members": ["vadr"]}, "unknown reward model 'vadr'"),
        ({"kind": "mean", "members": [3]}, r"members\[0\]: a reward is a text"),
        ({"kind": "mean", "members": "vader"}, "members must be a list"),
        ({"kind": "quantile", **TWO, "q": "low"}, "q must be a finite number"),
        ({"kind": "quantile", **TWO, "q": 2}, "a quantile is between 0 and 1"),
        ({"kind": "lower_bound", **TWO, "k": -1}, "k must be at least 0, it is -1"),
        ({"kind": "sum", "parts": {"a": {"reward": LENGTH, "wieght": 2}}}, "there is no setting parts.a.wieght"),
        ({"kind": "sum", "parts": {"a": {"reward": {"kind": "cached"}}}}, "the setting parts.a.reward.reward is miss"),
        ({"kind": "sum", "parts": {"a": LENGTH}}, "parts.a must be a mapping"),
        ({"kind": "rules", "preference": LENGTH, "rules": {"r": {}}}, "rules.r.pattern or rules.r.broken says"),
        ({"kind": "rules", "preference": LENGTH, "rules": {"r": {"pattern": "("}}}, r"'\(' is no regular expression"),
        ({"kind": "safety_first", "safety": ASKED, "helpfulness": ASKED, "tagged": "["}, "is no regular expression"),
        ({"kind": "normalised", "reward": LENGTH}, "normalised needs a file of responses"),
        ({"kind": "normalised", "reward": LENGTH, "mean": 0}, "normalised needs a file of responses"),
        ({"kind": "cached", "reward": LENGTH, "size": 0}, "a memory holds at least 1"),
        ({"kind": "remote", "url": "ftp://x"}, "no http:// or https:// URL"),
        ({"kind": "remote", "url": "http://x", "at_once": 0}, "needs at_once of at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_place(recipe, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(write(tmp_path, recipe))
    assert str(caught.value).startswith(f"{tmp_path / 'reward.yaml'}: ")


def test_a_recipe_that_contains_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"kind": "mean", "members": ["b.yaml"]}, "a.yaml")
    write(tmp_path, {"kind": "cached", "reward": "./a.yaml"}, "b.yaml")
    with pytest.raises(ConfigError, match="a.yaml: b.yaml: the recipe './a.yaml' contains itself"):
        load_reward("a.yaml")
    (tmp_path / "c.yaml").write_text("&a {kind: cached, reward: *a}", encoding="utf-8")
    with pytest.raises(ConfigError, match="c.yaml: .*nested more than 16 deep"):
        load_reward("c.yaml")


def test_what_is_no_recipe_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no file 'none.yaml', by its name a recipe"):
        load_reward("none.yaml")
    (tmp_path / "list.json").write_text(json.dumps(["vader"]), encoding="utf-8")
    with pytest.raises(ConfigError, match="list.json: a mapping of settings was expected"):
        load_reward(str(tmp_path / "list.json"))
    (tmp_path / "twice.yaml").write_text("kind: mean\nkind: sum\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="twice.yaml:2: 'kind' occurs twice"):
        load_reward(str(tmp_path / "twice.yaml"))
