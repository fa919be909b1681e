"""The commands of the stages before reinforcement learning: each takes what the one before it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_env.records.run import Run
from rlhf_env.text.corpus import film_reviews
from tests.serving import chatting, serving
from tests.tiny_files import write_rows, write_tiny_files


@pytest.fixture
def texts(tmp_path) -> Path:
    file = tmp_path / "reviews.txt"
    file.write_text("\n".join(film_reviews()[:120]) + "\n", encoding="utf-8")
    return file


def test_sft_prefer_reward_and_what_they_leave_for_train(command, texts, tmp_path):
    (tmp_path / "prompts.txt").write_text("the film is\nthe plot is\nit is\n")
    prompts, sft, prefer, reward = (tmp_path / name for name in ("prompts.txt", "sft", "prefer", "reward"))
    small = [f"new.{key}" for key in ("tokenizer=word", "n_layer=1", "n_embd=16", "n_head=2", "n_positions=32")]
    code, out, err = command(
        "sft", "--demonstrations", texts, "--out", sft, "--epochs", 3, "--learning-rate", 0.03, *small, "fit.epochs=1",
        "--seed", 4,
    )  # fmt: skip
    assert code == 0, err
    found = Run(sft).summary
    assert out.splitlines()[0] == (
        f"114 demonstrations, {found['parameters']:,} parameters; "
        f"held out {found['loss_before']:.3f} → {found['loss_after']:.3f} nats per token"
    )
    assert f"policy: {sft / 'model'}" in out and "2/2 steps  loss " in err
    assert Run(sft).config["fit"]["epochs"] == 1  # an override wins over its flag
    assert (Run(sft).config["fit"]["learning_rate"], Run(sft).config["seed"]) == (0.03, 4)

    code, out, err = command(
        "prefer", "--policy", sft / "model", "--prompts", prompts, "--gold", "vader", "--out", prefer,
        "--comparisons", 20, "--responses", 3, "--temperature", 0, "--flip-rate", 0.5, "--max-new-tokens", 6,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("20 comparisons of 3; labels agree with gold 0.")
    assert f"comparisons: {prefer / 'comparisons.jsonl'}" in out
    rows = [json.loads(line) for line in (prefer / "comparisons.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [3] * 20
    config = Run(prefer).config
    assert (config["labeler"]["temperature"], config["labeler"]["flip_rate"]) == (0.0, 0.5)
    assert config["env"]["max_new_tokens"] == 6

    code, out, err = command(
        "reward", "--comparisons", prefer / "comparisons.jsonl", "--body", sft / "model", "--gold", "vader",
        "--reference", sft / "model", "--prompts", prompts, "--out", reward, "--held-out", 0.3, "normalize_on=16",
        "env.max_new_tokens=6",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith(f"accuracy on {Run(reward).summary['held_out']} held-out comparisons 0.")
    assert f"reward model: {reward / 'model'}" in out and "steps  loss " in err

    code, out, err = command(
        "train", "--policy", sft / "model", "--prompts", prompts, "--reward", reward / "model", "--updates", 1,
        "--max-new-tokens", 6, "--out", tmp_path / "train", "settings.batch_size=8", "eval_episodes=4",
    )  # fmt: skip
    assert code == 0, err


def test_a_judge_behind_a_server_labels_for_reward(command, texts, tmp_path):
    folder = write_tiny_files(tmp_path / "tiny")
    (tmp_path / "judge.yaml").write_text(
        "comparisons: 12\njudge:\n  served_name: judge-7b\n  tie_policy: skip\n  http: {attempts: 1}\n"
    )
    judge = chatting(lambda question: "[[A]]" if question.index("Response A") % 2 else "[[B]] or [[A]]")
    with serving(judge) as served:
        code, out, err = command(
            "prefer", "--config", tmp_path / "judge.yaml", "--judge", served.url, "--policy", folder / "policy",
            "--prompts", folder / "prompts.txt", "--max-new-tokens", 4, "--out", tmp_path / "prefer",
            "judge.swap=false",
        )  # fmt: skip
    assert code == 0, err
    found = Run(tmp_path / "prefer").summary
    unparsed = f"{found['unparsed']} of {found['replies']} replies hold no verdict"
    assert out.startswith(f"12 comparisons of 2, {found['skipped']} skipped; {unparsed}\n")
    code, out, err = command(
        "reward", "--comparisons", tmp_path / "prefer" / "comparisons.jsonl", "--body", folder / "policy", "--out",
        tmp_path / "reward", "--held-out", 0.3,
    )  # fmt: skip
    assert code == 0, err


def test_revisions_are_for_sft_and_comparisons_for_reward(command, tmp_path):
    folder = write_tiny_files(tmp_path / "tiny")
    (tmp_path / "principles.yaml").write_text(
        "principles:\n- principle: The review is kind.\n  critique: Where is it unkind?\n"
    )
    with serving(chatting(lambda text: "it is wonderful and moving" if "Revision:" in text else "awful")) as served:
        code, out, err = command(
            "revise", "--principles", tmp_path / "principles.yaml", "--model", served.url, "--served-name", "m",
            "--prompts", folder / "prompts.txt", "--out", tmp_path / "revised", "--rounds", 2, "writer.http.attempts=1",
        )  # fmt: skip
    assert code == 0, err
    assert out.startswith("79 revisions of 79 responses (0 blank, 0 unchanged); 79 comparisons\n")
    assert f"demonstrations: {tmp_path / 'revised' / 'revisions.jsonl'}" in out
    for words in (
        ["sft", "--demonstrations", tmp_path / "revised" / "revisions.jsonl", "--policy", folder / "policy"],
        ["reward", "--comparisons", tmp_path / "revised" / "comparisons.jsonl", "--body", folder / "policy"],
    ):
        code, out, err = command(*words, "--out", tmp_path / words[0], "--epochs", 1)
        assert code == 0, err


def test_the_config_of_a_stage_replays_it(command, texts, tmp_path):
    tiny = ["new.tokenizer=word", "new.n_embd=16", "new.n_layer=1", "new.n_head=2", "--epochs", 1]
    command("sft", "--demonstrations", texts, "--out", tmp_path / "a", "--seed", 3, *tiny)
    code, _, err = command("sft", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    assert code == 0, err
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (
        tmp_path / "b/model/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--demonstrations", "t.txt"], "--out is missing: the folder to leave the result in"),
        (["sft", "--out", "x"], "the setting demonstrations is missing"),
        (["sft", "--out", "x", "--demonstrations", "none.txt"], "none.txt: No such file"),
        (["sft", "--out", "x", "--demonstrations", "bad.jsonl"], "bad.jsonl:2"),
        (["sft", "--out", "x", "--demonstrations", "t.txt", "fit.epocs=1"], "the command line: there is no"),
        (["sft", "--out", "x", "--demonstrations", "t.txt", "--epochs", "0"], "epochs must be at least 1, it is 0"),
        (["sft", "--out", "full", "--demonstrations", "t.txt"], "full exists and is not an empty folder"),
        (["prefer", "--out", "x", "--policy", "p", "--prompts", "t.txt"], "the setting gold is missing"),
        (["prefer", "--out", "x", "--policy", "./p", "--prompts", "t.txt", "--gold", "vader"], "there is no folder"),
        (["prefer", "--out", "x", "--policy", "p", "--prompts", "t.txt", "--gold", "vadr"], "unknown reward model"),
        (
            ["prefer", "--out", "x", "--policy", "p", "--prompts", "t.txt", "--gold", "vader", "--responses", "1"],
            "responses must be at least 2, it is 1",
        ),
        (
            ["prefer", "--out", "x", "--policy", "p", "--prompts", "t.txt", "--judge", "http://h/v1"],
            "http://h/v1 is a se",
        ),
        (["revise", "--out", "x", "--model", "p", "--prompts", "t.txt"], "the setting principles is missing"),
        (["revise", "--out", "x", "--principles", "t.txt", "--model", "p"], "revise needs either prompts"),
        (
            ["revise", "--out", "x", "--principles", "t.txt", "--prompts", "t.txt"],
            "the setting writer.model is missing",
        ),
        (["reward", "--out", "x", "--comparisons", "none.jsonl"], "none.jsonl: No such file"),
        (["reward", "--out", "x", "--comparisons", "bad.jsonl"], "bad.jsonl:2"),
        (["reward", "--out", "x", "--comparisons", "c.jsonl", "--reference", "p"], "to normalise on responses of a"),
        (["reward", "--out", "x", "--comparisons", "c.jsonl", "--held-out", "1"], "held_out must be a share between"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, words, message, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts.rename(tmp_path / "t.txt")
    write_rows(tmp_path / "bad.jsonl", {"prompt": "a", "response": "b"}, '{"prompt": "a", "respon')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "x").exists()
