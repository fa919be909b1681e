"""The report page of a run: every number in it is one of the files', and every text in it is shown, not obeyed."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.records.run import Run
from rlhf_env.records.safe_text import safe_text
from rlhf_env.report.content import Chart, Histogram, Point, Report, Table
from rlhf_env.text.tokenizers import byte_tokenizer
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.page import read_report, stage_result, write_report
from rlhf_env.training.pipeline import run_pipeline
from rlhf_env.training.run import run_training
from tests.report.pages import HOSTILE, Page
from tests.tiny_files import write_rows
from tests.tiny_pipeline import tiny_pipeline

TEXTS = [text for text in HOSTILE if "\ud800" not in text]  # no file of texts holds half a character


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A finished pipeline, of whose four updates the third is followed by an evaluation."""
    config = tiny_pipeline(tmp_path_factory.mktemp("texts"))
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_pipeline(replace(config, train=config.train | {"eval_every": 3}), out)
    return out


@pytest.fixture
def edited(pipeline, tmp_path):
    """A copy of the pipeline's training run, and how to change what its files say."""
    folder = tmp_path / "train"
    shutil.copytree(pipeline / "train", folder)

    def edit(**summary: Any) -> Path:
        Run(folder).write_summary({k: v for k, v in (Run(folder).summary | summary).items() if v is not None})
        return folder

    return edit


def chart(report: Report, title: str) -> Any:
    (found,) = [c for c in report.charts if c.title == title]
    return found


def series(report: Report, title: str) -> dict[str, tuple[Point, ...]]:
    found = chart(report, title)
    assert isinstance(found, Chart)
    return {s.name: s.points for s in found.series}


def table(report: Report, title: str) -> dict[str, Sequence[str]]:
    (found,) = [t for t in report.tables if t.title == title]
    assert isinstance(found, Table)
    return {row[0]: row[1:] for row in found.rows}


def with_interval(values: dict[str, Any], name: str) -> str:
    text = f"{values[name]:.3f} [{values[f'{name}_low']:.3f}, {values[f'{name}_high']:.3f}]"
    return text.replace("-0.000", "0.000")


# --- a training run --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["score", "gold", "kl"])
def test_a_curve_goes_from_before_training_to_after_it(pipeline, name):
    run = Run(pipeline / "train")
    summary, rows = run.summary, run.metrics
    curves = series(read_report(run.path), {"score": "Score", "gold": "Gold", "kl": "KL to the reference"}[name])
    batches = [Point(row["tokens"], row[name]) for row in rows if name in row]
    assert list(curves.get("training batches", ())) == batches
    assert len(batches) == (0 if name == "gold" else 4)  # gold is never seen in training
    after = (
        ("kl", "kl_low", "kl_high") if name == "kl" else (f"{name}_after", f"{name}_after_low", f"{name}_after_high")
    )
    assert curves["held-out prompts"] == (
        Point(0, *(summary[key] for key in (f"{name}_before", f"{name}_before_low", f"{name}_before_high"))),
        Point(rows[2]["tokens"], *(rows[2][f"eval_{name}{bound}"] for bound in ("", "_low", "_high"))),
        Point(summary["tokens"], *(summary[key] for key in after)),
    )


def test_an_evaluation_after_the_last_update_is_drawn_once(pipeline, edited):
    folder = edited()
    *rows, last = Run(folder).metrics
    last |= {"eval_score": 7.0, "eval_kl": 2.0}
    write_rows(folder / "metrics.jsonl", *rows, last)
    points = series(read_report(folder), "Score")["held-out prompts"]
    assert [point.x for point in points] == [0, rows[2]["tokens"], last["tokens"]]
    assert points[-1].y == 7.0


@pytest.mark.parametrize("name", ["Score", "Gold"])
def test_the_path_shows_what_was_gained_for_which_kl(pipeline, name):
    run, key = Run(pipeline / "train"), name.lower()
    summary, evaluated = run.summary, run.metrics[2]
    points = series(read_report(run.path), f"{name} for KL")["ppo"]
    assert [point.x for point in points] == [summary["kl_before"], evaluated["eval_kl"], summary["kl"]]
    assert [p.y for p in points] == [summary[f"{key}_before"], evaluated[f"eval_{key}"], summary[f"{key}_after"]]
    assert [p.label for p in points] == [f"{t:,} tokens" for t in (0, evaluated["tokens"], summary["tokens"])]


def test_a_policy_that_begins_away_from_its_reference_begins_with_that_kl(edited):
    points = series(read_report(edited(kl_before=3.5)), "Score for KL")["ppo"]
    assert points[0].x == 3.5


def test_a_run_says_what_it_was_and_how_it_did(pipeline):
    run = Run(pipeline / "train")
    report, summary = read_report(run.path), run.summary
    assert report.title == "Training run train"
    assert f"ppo, β = 0.1, seed 0, {summary['tokens']:,} sampled tokens" in report.subtitle
    assert f"torch {summary['versions']['torch']}" in report.footer
    results = table(report, "8 responses to held-out prompts")
    for name in ("score", "gold"):
        assert results[name] == tuple(with_interval(summary, f"{name}_{when}") for when in ("before", "after"))
    assert results["win_rate"][1] == with_interval(summary, "win_rate")
    assert [t.title for t in report.tables] == ["8 responses to held-out prompts"]
    lengths = chart(report, "Response length")
    assert isinstance(lengths, Histogram) and lengths.groups == {"after": [row["length"] for row in run.samples]}


def test_what_was_not_measured_is_left_out(edited, pipeline):
    names = [f"gold_{when}{bound}" for bound in ("", "_low", "_high") for when in ("before", "after")]
    report = read_report(edited(held_out=False, **dict.fromkeys(names)))
    rows = [row for row in Run(pipeline / "train").metrics if "eval_gold" in row]
    assert len(rows) == 1 and len(series(report, "Gold")["evaluation"]) == 1
    assert "gold" not in table(report, "8 responses to the training prompts")


# --- a pipeline ------------------------------------------------------------------------------------


def test_the_page_of_a_pipeline_tells_of_every_stage(pipeline):
    report, stage = (
        read_report(pipeline),
        {n: Run(pipeline / n) for n in ("sft", "prefer", "reward", "train", "evaluate")},
    )
    assert report.title == "Pipeline whole"
    rows = table(report, "Stages")
    assert list(rows) == list(stage)
    for name, run in stage.items():
        assert rows[name] == (f"{run.summary['seconds']:,.1f} s", stage_result(name, run.summary))
    told = {name: result for name, (_, result) in rows.items()}
    sft, reward = stage["sft"].summary, stage["reward"].summary
    assert told["sft"].startswith("190 demonstrations, ") and f"{sft['parameters']:,} parameters" in told["sft"]
    assert told["sft"].endswith(f"held out {sft['loss_before']:.3f} → {sft['loss_after']:.3f} nats per token")
    assert told["prefer"].startswith("40 comparisons of 2; labels agree with gold ")
    assert told["reward"].startswith(
        f"accuracy on {reward['held_out']} held-out comparisons {reward['accuracy']:.3f} ["
    )
    assert f"with gold {reward['gold_accuracy']:.3f} [" in told["reward"]
    assert told["train"].startswith("4 updates, ")
    assert told["evaluate"].startswith(f"score {stage['evaluate'].summary['score']:.3f} [")


def test_before_and_after_are_the_final_evaluations(pipeline):
    run, report = Run(pipeline / "evaluate"), read_report(pipeline)
    summary = run.summary
    results = table(report, f"16 responses to {summary['prompts']} held-out prompts")
    for name in ("score", "gold", "length", "eos_rate"):
        assert results[name] == tuple(with_interval(summary, key) for key in (f"reference_{name}", name))
    assert results["distinct_2"] == (f"{summary['reference_distinct_2']:.3f}", f"{summary['distinct_2']:.3f}")
    assert results["kl"][0] == results["win_rate"][0] == "–"  # the reference's own, to itself
    lengths = chart(report, "Response length")
    assert lengths.groups == {
        "before": [row["reference_length"] for row in run.samples],
        "after": [row["length"] for row in run.samples],
    }


def test_the_other_charts_show_what_the_stages_logged(pipeline):
    report = read_report(pipeline)
    losses = series(report, "Fine-tuning")["loss of each batch"]
    assert [(p.x, p.y) for p in losses] == [(r["step"], r["loss"]) for r in Run(pipeline / "sft").metrics]

    reward = Run(pipeline / "reward").summary
    calibration = chart(report, "Calibration of the reward model")
    (bins,) = calibration.series
    assert calibration.diagonal
    assert [(p.x, p.y, p.label) for p in bins.points] == [
        (row["predicted"], row["observed"], f"{row['count']} pairs") for row in reward["reliability"]
    ]
    assert f"error {reward['ece']:.3f}" in calibration.note and f"log-loss {reward['log_loss']:.3f}" in calibration.note

    best_of = Run(pipeline / "evaluate").summary["best_of"]
    for name in ("score", "gold"):
        (best,) = [p for s, p in series(report, f"{name.capitalize()} for KL").items() if s.startswith("best of n")]
        assert best == tuple(
            Point(row["kl_bound"], row[name], row[f"{name}_low"], row[f"{name}_high"], f"best of {row['n']}")
            for row in best_of
        )
    assert [row["n"] for row in best_of] == [1, 2, 4]


def test_the_samples_are_the_evaluations_with_every_tokens_numbers(pipeline):
    rows, samples = Run(pipeline / "evaluate").tokens, read_report(pipeline).samples
    assert len(samples) == len(rows) == 12
    for row, sample in zip(rows, samples, strict=True):
        assert sample.prompt == row["prompt"] and sample.before is not None
        for response, said in ((sample.after, row["policy"]), (sample.before, row["reference"])):
            assert response.pieces == tuple(said["pieces"])
            assert (response.by_token, response.facts) == (said["numbers"], said["facts"])


def test_a_pipeline_whose_prompts_were_trained_on_says_so(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "same")
    train = Run(tmp_path / "same/train")
    train.write_summary(train.summary | {"held_out": False})
    titles = [t.title for t in read_report(tmp_path / "same").tables]
    assert titles[0].endswith("training prompts") and not any("held-out" in title for title in titles)


def test_the_page_is_written_again_as_it_was(pipeline):
    page = pipeline / "report.html"
    before = page.read_bytes()
    assert write_report(pipeline) == page and page.read_bytes() == before
    assert b"Pipeline whole" in before


# --- what has no page ------------------------------------------------------------------------------


def test_what_is_not_finished_or_no_run_has_no_page(pipeline, edited, tmp_path):
    folder = edited()
    (folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="is not finished: it has no summary.json yet"):
        write_report(folder)
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    for stage in ("sft", "prefer", "reward", "evaluate"):
        with pytest.raises(
            ConfigError, match="holds another stage: only a training run and a whole pipeline have a re"
        ):
            read_report(pipeline / stage)


# --- hostile text ----------------------------------------------------------------------------------


def assert_harmless(page: Path, texts: Iterable[str]) -> Page:
    """Nothing of the page runs or loads anything, and all `texts` are there to be read."""
    parsed = Page(page.read_text(encoding="utf-8"))
    assert not {"script", "iframe", "img", "b", "object", "embed", "link"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "srcdoc")]
    shown = "".join(text for texts in parsed.text.values() for text in texts)
    for text in texts:
        assert safe_text(text, multiline=True) in shown
    return parsed


def as_tokens(pieces: Iterable[str]) -> list[str]:
    """How the page shows them: a token that is a line break is to be seen, and breaks the line."""
    return [safe_text(piece, multiline=True).replace("\n", "⏎\n").replace("\t", "⇥\t") for piece in pieces]


def test_hostile_prompts_end_as_text_in_the_page_of_a_real_run(tmp_path):
    """A policy of bytes with random weights answers them with noise, control characters among it."""
    config = tiny_config("gpt2", 259, n_layer=1, n_embd=16, n_head=2, n_positions=256)
    CausalLM.from_config(config, byte_tokenizer()).save_pretrained(tmp_path / "policy")
    prompts = write_rows(tmp_path / "prompts.jsonl", *({"prompt": text} for text in TEXTS if len(text) < 200))
    settings = TrainConfig(
        policy=str(tmp_path / "policy"),
        prompts=prompts,
        eval_prompts=prompts,
        reward="vader",
        updates=1,
        eval_episodes=12,
        env=EnvConfig(max_new_tokens=8),
        settings={"batch_size": 4, "epochs": 1},
    )
    out = tmp_path / "<img src=x onerror=alert(1)>"
    run_training(settings, out)
    samples = Run(out).tokens
    page = assert_harmless(out / "report.html", [out.name, *(row["prompt"] for row in samples)])
    sides = ("reference", "policy")
    assert page.tokens == as_tokens(piece for row in samples for side in sides for piece in row[side]["pieces"])
    assert any("\x1b" in row["prompt"] for row in samples) and any("<script>" in row["prompt"] for row in samples)


def test_hostile_responses_and_names_end_as_text_in_the_page(edited, pipeline):
    every = " ".join(TEXTS)
    folder = edited(agent=every, device_name=every, versions={every: every})
    numbers = {"reward": [1.0] * len(TEXTS), every: [0.5] * len(TEXTS)}
    response = {"pieces": TEXTS, "numbers": numbers, "facts": {"score": 1.0, every: 2.0}}
    write_rows(folder / "tokens.jsonl", {"prompt": every, "policy": response, "reference": response})
    page = assert_harmless(write_report(folder), [every, *TEXTS])
    assert page.tokens == as_tokens(TEXTS) * 2
    assert json.loads((folder / "summary.json").read_text())["agent"] == every
