"""`rlhf-env revise`: what is asked of the model, what becomes of its texts, and what is kept of a lost server."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from rlhf_env.errors import ConfigError, DataError, RemoteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.generation import text_generator
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.records.config import build, read_layer
from rlhf_env.records.jsonl import read_jsonl
from rlhf_env.records.run import Run
from rlhf_env.settings import HTTPConfig
from rlhf_env.text.demonstrations import load_demonstrations
from rlhf_env.training import revise
from rlhf_env.training.config import ReviseConfig
from rlhf_env.training.labeler_config import JudgeConfig, WriterConfig
from rlhf_env.training.revise import run_revise
from tests.serving import chat, chatting, reply, serving
from tests.tiny_files import write_rows, write_tiny_files

ONCE = HTTPConfig(read_timeout=5.0, attempts=1)


def scribe(text: str) -> str:
    """Responds, criticises and revises, each in a way that can be told; knows a verdict, too."""
    if "Which response follows" in text:
        return "[[A]]" if text.index("Kinder") < text.index("Response B") else "[[B]]"
    if text.endswith("Critique:"):
        return "It is unkind."
    return "Kinder words." if text.endswith("Revision:") else f"Go away, {text}!"


@pytest.fixture
def config(tmp_path) -> ReviseConfig:
    (tmp_path / "principles.txt").write_text("Be kind.\nBe brief.\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    writer = WriterConfig("http://nobody/v1", "m", http=ONCE)
    return ReviseConfig(str(tmp_path / "principles.txt"), prompts=str(tmp_path / "prompts.txt"), writer=writer)


def at(url: str, config: ReviseConfig, **settings) -> ReviseConfig:
    return replace(config, writer=replace(config.writer, model=url), **settings)


def test_revisions_are_demonstrations_and_better_than_what_they_revise(config, tmp_path):
    out = tmp_path / "out"
    with serving(chatting(scribe)) as served:
        summary = run_revise(settings := at(served.url, config, rounds=2), out)
    assert build(ReviseConfig, read_layer(out / "config.yaml")) == settings
    demonstrations = load_demonstrations(out / "revisions.jsonl")
    assert [(d.prompt, d.response) for d in demonstrations] == [(p, "Kinder words.") for p in ("one", "two", "three")]
    row = read_jsonl(out / "revisions.jsonl")[0]
    assert (row["first_response"], row["model"], len(row["steps"])) == ("Go away, one!", "m", 2)
    first = read_comparisons(out / "comparisons.jsonl")[0]
    assert (first.responses, first.ranks) == (("Go away, one!", "Kinder words."), (1, 0))
    assert (first.labeler, first.writers) == ("constitution", ("m", "m, revised"))
    assert len(served.asked) == 3 * (1 + 2 * 2)  # a response, and two critiques and revisions of each
    counts = {name: summary[name] for name in ("responses", "revisions", "blank", "unchanged", "comparisons")}
    assert counts == {"responses": 3, "revisions": 3, "blank": 0, "unchanged": 0, "comparisons": 3}
    assert "replies" not in summary


def test_responses_of_a_file_are_revised_in_place_of_the_models_own(config, tmp_path):
    rows = [{"prompt": "p", "response": " bad", "more": 1}, {"prompt": "p", "response": ""}]
    file = write_rows(tmp_path / "responses.jsonl", *rows)
    with serving(chatting(scribe)) as served:
        run_revise(at(served.url, config, prompts=None, responses=file), tmp_path / "out")
    assert [row["response"] for row in read_jsonl(tmp_path / "out" / "revisions.jsonl")] == [
        " Kinder words.",  # what stands between prompt and response is kept
        "Kinder words.",
    ]
    assert len(served.asked) == 4
    assert read_comparisons(tmp_path / "out" / "comparisons.jsonl")[0].writers == ("", "m, revised")


def test_a_judge_compares_by_the_principles(config, tmp_path):
    with serving(chatting(scribe)) as served:
        settings = at(served.url, config, judge=JudgeConfig(served.url, "j", http=ONCE))
        summary = run_revise(settings, tmp_path / "out")
    comparisons = read_comparisons(tmp_path / "out" / "comparisons.jsonl")
    assert [c.ranks for c in comparisons] == [(1, 0)] * 3
    assert {c.labeler for c in comparisons} <= {"judge: j, principle: Be kind.", "judge: j, principle: Be brief."}
    assert all(c.order is not None and c.writers == ("m", "m, revised") for c in comparisons)
    assert (summary["replies"], summary["unparsed"]) == (6, 0)
    assert Counter(body["model"] for _, body in served.asked) == {"m": 9, "j": 6}


def test_blank_and_unchanged_revisions_are_counted(config, tmp_path):
    rows = [{"prompt": text, "response": text} for text in ("same", "blank", "other")]
    file = write_rows(tmp_path / "responses.jsonl", *rows)

    def model(text):
        if text.endswith("Critique:"):
            return "hm"
        return "" if "\nblank\n" in text else "same"

    with serving(chatting(model)) as served:
        summary = run_revise(at(served.url, config, prompts=None, responses=file), tmp_path / "out")
        assert (summary["revisions"], summary["blank"], summary["unchanged"], summary["comparisons"]) == (2, 1, 1, 1)
        (comparison,) = read_comparisons(tmp_path / "out" / "comparisons.jsonl")
        assert comparison.responses == ("other", "same")
        write_rows(tmp_path / "responses.jsonl", rows[1])
        with pytest.raises(DataError, match="all 1 revisions are blank: does m follow instructions"):
            run_revise(at(served.url, config, prompts=None, responses=file), tmp_path / "none")


def test_a_lost_server_leaves_what_was_made_before(config, tmp_path, monkeypatch):
    monkeypatch.setattr(revise, "_REVISED_TOGETHER", 1)
    asked = count()

    def until_it_dies(connection, body, n):
        if next(asked) >= 7:  # two responses with critique and revision, and the third response
            reply(connection, b"gone", status=500)
        else:
            reply(connection, chat(scribe(body["messages"][0]["content"])))

    with serving(until_it_dies) as served, pytest.raises(RemoteError) as error:
        run_revise(at(served.url, config), tmp_path / "lost")
    assert "gone; 2 revisions and 2 comparisons were made before, and are in" in str(error.value)
    assert not Run(tmp_path / "lost").finished
    with serving(chatting(scribe)) as served:
        run_revise(at(served.url, config), tmp_path / "whole")
    for file in ("revisions.jsonl", "comparisons.jsonl"):
        assert read_jsonl(tmp_path / "lost" / file) == read_jsonl(tmp_path / "whole" / file)[:2]


def test_parts_come_to_what_the_whole_does(config, tmp_path, monkeypatch):
    with serving(chatting(scribe)) as served:
        run_revise(at(served.url, config), tmp_path / "whole")
        monkeypatch.setattr(revise, "_REVISED_TOGETHER", 2)
        told = []
        run_revise(at(served.url, config), tmp_path / "parts", progress=lambda *more: told.append(more))
    whole, parts = (tmp_path / name / "revisions.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert told == [(2, 3), (1, 3)]


def test_a_local_model_revises_what_it_wrote(config, tmp_path):
    """Its weights are random, so its texts mean nothing; but they are its own."""
    folder = write_tiny_files(tmp_path / "tiny")
    (tmp_path / "critique.txt").write_text("{fence}{prompt}{response}{fence}{request}\n")
    (tmp_path / "revision.txt").write_text("{fence}{response}{fence}{critique}{fence}{request} {prompt}\n")
    writer = WriterConfig(str(folder / "policy"), max_new_tokens=4, temperature=1.0)
    local = replace(
        config,
        prompts=str(folder / "prompts.txt"),
        writer=writer,
        critique_template=str(tmp_path / "critique.txt"),
        revision_template=str(tmp_path / "revision.txt"),
        seed=3,
    )
    run_revise(local, tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "revisions.jsonl")
    generate = text_generator(CausalLM.from_pretrained(folder / "policy"), max_new_tokens=4, greedy=False, seed=3)
    assert [row["first_response"] for row in rows[:5]] == generate([row["prompt"] for row in rows[:5]])
    first = rows[0]
    request = f"Say how the response falls short of this principle: {first['steps'][0]['principle']}"
    critique = generate([f"```{first['prompt']}{first['first_response']}```{request}"])[0].strip()
    assert first["steps"][0]["critique"] == critique
    assert len({json.dumps(row["steps"]) for row in rows}) > 10
    run_revise(local, tmp_path / "again")
    assert (tmp_path / "again" / "revisions.jsonl").read_bytes() == (tmp_path / "out" / "revisions.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"principles": "no.txt"}, r"no\.txt: No such file"),
        ({"prompts": "no.txt"}, r"no\.txt: No such file"),
        ({"prompts": None, "responses": "bad.jsonl"}, r"bad\.jsonl:1: the key 'response' is missing"),
        ({"critique_template": "bad.jsonl"}, "the template must hold {prompt}, {response}, {request}, {fence}"),
        ({"revision_template": "critique.txt"}, "the template must hold {critique}"),
        ({"writer": WriterConfig("./no-model")}, "there is no folder ./no-model"),
        ({"judge": JudgeConfig("./no-model")}, "there is no folder ./no-model"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_a_mistake_leaves_no_folder(config, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("bad.jsonl"), {"prompt": "p"})
    Path("critique.txt").write_text("{fence}{prompt}{response}{request}")
    with pytest.raises((ConfigError, DataError), match=message):
        run_revise(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": "r.jsonl"}, "either prompts, to respond to, or responses"),
        ({"prompts": None}, "either prompts, to respond to, or responses"),
        ({"rounds": 0}, "rounds must be at least 1, it is 0"),
        ({"seed": -1}, "seed must be at least 0, it is -1"),
        ({"writer": WriterConfig()}, "the setting writer.model is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)
