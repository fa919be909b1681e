"""`rlhf-env online`; a whole loop is run in tests/test_examples.py."""

from __future__ import annotations

from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "online.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml", "--out", "x"], "none.yaml: No such file"),
        ([FILE], "--out is missing: the folder to leave the loop in"),
        ([FILE, "--out", "x", "rounds=none"], "the command line: rounds must be a whole number"),
        (
            [FILE, "--out", "x", "rule=best"],
            "the command line: rule must be one of uniform, disagreement, entropy, bald",
        ),
        (
            [FILE, "--out", "x", "pool=100"],
            "a round asks about 480 pairs, at most one of each prompt of the pool, which",
        ),
        ([FILE, "--out", "x", "train.updates=2"], "train's budget of 2 updates is that of all rounds together"),
        ([FILE, "--out", "x", "reward.epochs=1"], "the loop's settings: there is no setting reward.epochs"),
        ([FILE, "--out", "x", "gold=vadr"], "unknown reward model 'vadr'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, words, message):
    code, out, err = command("online", *words)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"error: {message}")
    assert not Path("x").exists()


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(command, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_env.training.online.run_pool", interrupt)
    code, _, err = command("online", FILE, "--out", tmp_path / "out")
    assert code == 130 and err.splitlines()[-2:] == ["round-0/pool …", "interrupted; the same command continues it"]
