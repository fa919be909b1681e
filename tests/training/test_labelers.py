"""Judges from settings: local models and servers, by verdict and by log-odds, by principle, among others, and lost."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from rlhf_env.errors import ConfigError, DataError, RemoteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.generation import continuation_log_odds
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.preferences.judge import LogOddsJudge, fill_template
from rlhf_env.preferences.populations import Population
from rlhf_env.records.config import Layer, build, override_layer, to_dict
from rlhf_env.records.run import Run
from rlhf_env.settings import HTTPConfig
from rlhf_env.training import prefer
from rlhf_env.training.config import EnvConfig, PreferConfig
from rlhf_env.training.labeler_config import JudgeConfig, MemberConfig
from rlhf_env.training.labelers import build_labelers, reply_counts
from rlhf_env.training.prefer import ask, run_prefer
from tests.builders import letter_score
from tests.serving import chat, chatting, reply, serving
from tests.tiny_files import write_letter_files, write_tiny_files

ONCE = HTTPConfig(read_timeout=5.0, attempts=1)
SHORT = "{fence}{prompt}{fence}{first}{fence}{second}{fence}"  # for a model that reads few tokens


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> PreferConfig:
    """Comparisons of a random model's letters, which nobody judges yet."""
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    return PreferConfig(
        str(folder / "policy"),
        str(folder / "prompts.txt"),
        "tests.builders:letter_score",
        comparisons=10,
        num_envs=8,
        env=EnvConfig(max_new_tokens=6),
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> PreferConfig:
    """Comparisons of a random model's words, judged by the model itself."""
    folder = write_tiny_files(tmp_path_factory.mktemp("words"))
    (folder / "short.txt").write_text(f"{SHORT}\n")
    judge = JudgeConfig(str(folder / "policy"), template=str(folder / "short.txt"), max_new_tokens=4)
    return PreferConfig(
        str(folder / "policy"),
        str(folder / "prompts.txt"),
        comparisons=6,
        num_envs=8,
        env=EnvConfig(max_new_tokens=4),
        judge=judge,
    )


def at(url: str, **settings) -> JudgeConfig:
    return JudgeConfig(url, served_name="judge-7b", http=ONCE, **settings)


def texts_of(question: str) -> list[str]:
    return re.findall(r"^```\n(.*?)\n```$", question, re.MULTILINE | re.DOTALL)


def least(question: str) -> str:
    """The response that comes first in the alphabet is better."""
    _, first, second = texts_of(question)
    return f"I compared them. [[{'A' if first < second else 'B'}]]"


def test_a_judge_behind_a_server_labels_and_needs_no_gold(letters, tmp_path):
    with serving(chatting(least)) as served:
        run_prefer(replace(letters, gold=None, judge=at(served.url)), tmp_path)
    comparisons, summary = read_comparisons(tmp_path / "comparisons.jsonl"), Run.open(tmp_path).summary
    assert len(comparisons) == 10 == summary["comparisons"]
    for c in comparisons:
        assert c.ranks == ((0, 1) if c.responses[0] < c.responses[1] else (1, 0))
        assert c.labeler == "judge: judge-7b"
    assert (summary["replies"], summary["unparsed"], summary["disagreed"]) == (20, 0, 0)
    assert len(served.asked) == 20 and {body["model"] for _, body in served.asked} == {"judge-7b"}
    assert "label_agreement" not in summary


def test_with_a_gold_the_judges_agreement_with_it_is_measured(letters, tmp_path):
    with serving(chatting(lambda question: "[[A]]")) as served:
        run_prefer(replace(letters, judge=at(served.url, swap=False)), tmp_path)
    summary = Run.open(tmp_path).summary
    assert 0 < summary["label_agreement"] < 1 and summary["replies"] == 10
    for c in read_comparisons(tmp_path / "comparisons.jsonl"):
        assert c.order is not None and c.ranks[c.order[0]] == 0  # it likes what it sees first, wherever that is stored


def test_a_judge_of_places_is_a_tie_or_no_answer(letters, tmp_path):
    with serving(chatting(lambda question: "[[B]]")) as served:
        run_prefer(replace(letters, judge=at(served.url)), tmp_path / "tie")
        with pytest.raises(DataError, match=r"only 0 answers: the labelers skip nearly all.*tie_policy be tie"):
            run_prefer(replace(letters, judge=at(served.url, tie_policy="skip")), tmp_path / "skip")
    assert {c.ranks for c in read_comparisons(tmp_path / "tie" / "comparisons.jsonl")} == {(0, 0)}
    assert Run.open(tmp_path / "tie").summary["disagreed"] == 10


def test_replies_without_a_verdict_are_counted_and_made_up_for(letters, tmp_path):
    def hesitant(question):
        return "Hard to say." if "a" in texts_of(question)[1] else least(question)

    with serving(chatting(hesitant)) as served:
        run_prefer(replace(letters, judge=at(served.url)), tmp_path)
    comparisons, summary = read_comparisons(tmp_path / "comparisons.jsonl"), Run.open(tmp_path).summary
    assert len(comparisons) == 10 and not any("a" in "".join(c.responses) for c in comparisons)
    unparsed = [body for _, body in served.asked if "a" in texts_of(body["messages"][0]["content"])[1]]
    assert summary["unparsed"] == len(unparsed) > 0 and summary["replies"] == len(served.asked)
    assert summary["skipped"] == summary["asked"] - 10 > 0


def test_a_judge_that_never_gives_a_verdict_is_given_up_early(letters, tmp_path):
    with serving(chatting(lambda question: "As a language model …")) as served:
        with pytest.raises(DataError, match=r"2\d of the judge's 2\d replies hold no verdict.*judge\.max_new_tokens"):
            run_prefer(replace(letters, judge=at(served.url)), tmp_path / "out")
    assert len(served.asked) < 30  # as many queries as comparisons were wanted, each in two orders
    assert not Run(tmp_path / "out").finished


def test_a_lost_server_is_an_error_and_what_was_labelled_is_kept(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(prefer, "_ASKED_TOGETHER", 2)  # queries, of 2 questions each
    asked = count()

    def until_it_dies(connection, body, n):
        if next(asked) >= 10:
            reply(connection, b"gone", status=500)
        else:
            reply(connection, chat(least(body["messages"][0]["content"])))

    with serving(until_it_dies) as served, pytest.raises(RemoteError) as error:
        run_prefer(replace(letters, judge=at(served.url)), tmp_path / "lost")
    kept = read_comparisons(tmp_path / "lost" / "comparisons.jsonl")
    assert f"status 500: gone; 4 comparisons were made before, and are in {tmp_path}" in str(error.value)
    assert not Run(tmp_path / "lost").finished
    with serving(chatting(least)) as served:
        run_prefer(replace(letters, judge=at(served.url)), tmp_path / "whole")
    assert kept == read_comparisons(tmp_path / "whole" / "comparisons.jsonl")[:4]
    with pytest.raises(RemoteError, match=r"cannot be reached .*address\?$"):  # nothing was made, nothing is kept
        run_prefer(replace(letters, judge=at(served.url)), tmp_path / "never")
    assert not (tmp_path / "never" / "comparisons.jsonl").exists()


def test_ctrl_c_keeps_what_was_labelled(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(prefer, "_ASKED_TOGETHER", 4)
    calls = count()

    def impatient(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    monkeypatch.setattr(prefer, "ask", impatient)
    with pytest.raises(KeyboardInterrupt):
        run_prefer(letters, tmp_path)
    assert len(read_comparisons(tmp_path / "comparisons.jsonl")) == 8 and not Run(tmp_path).finished


def test_each_query_goes_to_a_judge_by_one_principle(letters, tmp_path):
    (tmp_path / "principles.txt").write_text("Be brief.\nBe kind.\n")
    with serving(chatting(least)) as served:
        judge = at(served.url, principles=str(tmp_path / "principles.txt"))
        run_prefer(replace(letters, judge=judge, comparisons=30), tmp_path / "out")
    by = Counter(c.labeler for c in read_comparisons(tmp_path / "out" / "comparisons.jsonl"))
    assert set(by) == {"judge: judge-7b, principle: Be brief.", "judge: judge-7b, principle: Be kind."}
    questions = Counter("better? Be brief." in body["messages"][0]["content"] for _, body in served.asked)
    assert questions[True] == 2 * by["judge: judge-7b, principle: Be brief."]
    assert Run.open(tmp_path / "out").summary["replies"] == 60


def test_judges_and_simulated_labelers_share_the_queries(letters, tmp_path):
    (tmp_path / "principles.txt").write_text("Be brief.\nBe kind.\n")
    with serving(chatting(least)) as served:
        judge = at(served.url, principles=str(tmp_path / "principles.txt"))
        run_prefer(
            replace(letters, labelers=(MemberConfig(), MemberConfig(judge=judge)), comparisons=60), tmp_path / "o"
        )
    by = {c.labeler.partition(":")[0] for c in read_comparisons(tmp_path / "o" / "comparisons.jsonl")}
    assert by == {"0 simulated", "1 judge"}


def test_the_judges_of_a_constitution_share_the_weight_of_one_member(tmp_path):
    (tmp_path / "principles.txt").write_text("Be brief.\nBe kind.\n")
    judge = at("http://nobody/v1", principles=str(tmp_path / "principles.txt"))
    several = (MemberConfig(weight=3.0), MemberConfig(judge=judge))
    population = build_labelers(MemberConfig(), several, 1, gold="vader", seed=0, load=lambda name: letter_score)
    assert isinstance(population, Population)
    assert population.probabilities(0) == [3 / 4, 1 / 8, 1 / 8]
    assert reply_counts(population) == {"replies": 0, "unparsed": 0, "disagreed": 0}
    assert reply_counts(population.labelers[0]) == {}
    with pytest.raises(ConfigError, match="a simulated labeler needs gold"):
        build_labelers(MemberConfig(), (), 1, gold=None, seed=0, load=lambda name: letter_score)


# --- a local model ---------------------------------------------------------------------------------


def test_a_local_model_that_knows_no_verdict_says_so(words, tmp_path):
    with pytest.raises(DataError, match=r"of the judge's 1\d replies hold no verdict.*judge\.by=log_odds"):
        run_prefer(words, tmp_path / "out")


def test_a_local_models_log_odds_are_kept_as_probabilities(words, tmp_path):
    judge = replace(words.judge, by="log_odds", words=(" good", " bad"))
    run_prefer(replace(words, judge=judge), tmp_path)
    comparisons = read_comparisons(tmp_path / "comparisons.jsonl")
    odds = continuation_log_odds(CausalLM.from_pretrained(words.policy), " good", " bad")
    for c in comparisons:
        a, b = (
            float(odds([fill_template(SHORT, prompt=c.prompt, first=first, second=second)])[0])
            for first, second in (c.responses, c.responses[::-1])
        )
        assert c.preference is not None and 0 < c.preference < 1
        assert LogOddsJudge(lambda _, pair=(a, b): list(pair)).preferences(["p"], [("x", "y")])[0] == pytest.approx(
            c.preference, abs=1e-6
        )
        assert c.order is not None and c.labeler == f"judge: {words.policy}"
    assert "replies" not in Run.open(tmp_path).summary


def test_an_answer_depends_on_the_texts_alone(words, tmp_path):
    judge = replace(words.judge, by="log_odds", words=(" good", " bad"))
    for n in (6, 3):
        run_prefer(replace(words, judge=judge, comparisons=n), tmp_path / str(n))
    six, three = (read_comparisons(tmp_path / n / "comparisons.jsonl") for n in ("6", "3"))
    assert [c.responses for c in six[:3]] == [c.responses for c in three]
    assert [c.preference for c in six[:3]] == pytest.approx([c.preference for c in three], abs=1e-5)


# --- settings --------------------------------------------------------------------------------------


def test_judges_from_a_file_and_the_command_line(letters):
    settings = replace(letters, judge=JudgeConfig("folder", by="log_odds", words=("yes", "no"), swap=False))
    assert build(PreferConfig, Layer("a file", to_dict(settings))) == settings
    plain = Layer("a file", {"policy": "p", "prompts": "t"})
    typed = override_layer(["judge.model=http://h/v1", "judge.served_name=m", "judge.http.attempts=2"])
    assert build(PreferConfig, plain, typed).judge == JudgeConfig("http://h/v1", "m", http=HTTPConfig(attempts=2))
    with pytest.raises(ConfigError, match=r"there is no setting judge\.temprature; did you mean judge\.temperature"):
        build(PreferConfig, plain, override_layer(["judge.temprature=1"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": {"by": "log_odds"}}, "a judge needs a model: judge.model"),
        ({"judge": {"model": "http://h/v1"}}, "http://h/v1 is a server: say served_name"),
        ({"judge": {"model": "folder", "served_name": "m"}}, "served_name is of a model that is a URL; folder is none"),
        ({"judge": {"model": "http://h/v1", "served_name": "m", "by": "log_odds"}}, "log_odds needs a local model"),
        ({"judge": {"model": "m", "words": ["A", "B"]}}, "words are of a judge by log_odds"),
        ({"judge": {"model": "m", "temperature": -1}}, "Judge needs temperature of at least 0, it is -1"),
        ({"judge": {"model": "m", "max_new_tokens": 0}}, "Judge needs max_new_tokens of at least 1, it is 0"),
        ({"judge": {"model": "m"}, "biases": {"log_words": 1.0}}, "m judges by its question, not by gold, biases"),
        ({"judge": {"model": "m"}, "labelers": [{}]}, "there is one labeler"),
        ({"labelers": [{"judge": {"model": "m"}}, {}]}, "the setting gold is missing: a simulated labeler"),
        ({}, "the setting gold is missing: a simulated labeler"),
    ],
)
def test_judges_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(PreferConfig, Layer("a file", {"policy": "p", "prompts": "t", **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no.txt"}, r"no\.txt: No such file"),
        ({"template": "bad.txt"}, "the template must hold {second}"),
        ({"principles": "no.txt"}, r"no\.txt: No such file"),
        ({"principles": "one.txt", "template": "short.txt"}, "the template must hold {principle}"),
        (
            {"template": "principle.txt"},
            r"principle\.txt has a place for a principle, but there are no judge\.principles",
        ),
        ({"model": "./no-model"}, "there is no folder ./no-model"),
        ({"chat_template": "no.jinja"}, "chat_template must be auto, none or a Jinja file"),
    ],
)
def test_a_mistake_leaves_no_folder(words, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_text("{fence}{prompt}{first}")
    Path("short.txt").write_text(SHORT)
    Path("one.txt").write_text("Be brief.\n")
    Path("principle.txt").write_text(f"{SHORT}{{principle}}")
    with pytest.raises((ConfigError, DataError), match=message):
        run_prefer(replace(words, judge=replace(words.judge, **settings)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
