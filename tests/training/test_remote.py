"""A server in a policy's place: what generate, prefer and evaluate make of it, and what refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_env.errors import ConfigError, PromptTooLongError, TokenizerError
from rlhf_env.http import API_KEY
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.remote import RemoteLM
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.records.config import build, read_layer
from rlhf_env.records.jsonl import read_jsonl
from rlhf_env.settings import HTTPConfig, ServerConfig
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, EvaluateConfig, GenerateConfig, PreferConfig, TrainConfig
from rlhf_env.training.evaluate import evaluate
from rlhf_env.training.inference import generate, run_evaluation
from rlhf_env.training.prefer import run_prefer
from tests.builders import PROMPTS, make_envs, random_model
from tests.serving import serving_model
from tests.tiny_files import write_letter_files

SETTINGS = ServerConfig(model="tiny", tokenizer="letters", http=HTTPConfig(read_timeout=5.0, attempts=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_letter_files(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def served():
    with serving_model(random_model()) as running:
        yield running


@pytest.fixture(scope="module")
def server(folder) -> ServerConfig:
    return replace(SETTINGS, tokenizer=str(folder / "policy"))


def remote(served) -> RemoteLM:
    return RemoteLM(served.url, random_model().tokenizer, SETTINGS)


def test_the_kl_is_that_of_the_same_weights_on_the_same_responses(served):
    envs = make_envs(4, reference=random_model(seed=1))
    found = evaluate(remote(served), envs, 8 * PROMPTS, seed=3)
    rollout = collect(remote(served), envs, 8 * PROMPTS, seed=3)
    ours, theirs = (teacher_forced_logp(model, rollout) for model in (random_model(), random_model(seed=1)))
    kl = torch.where(rollout.response_mask, ours - theirs, 0.0).sum(1)
    assert kl.std() > 0.5
    assert torch.tensor([row["kl"] for row in found.samples]) == pytest.approx(kl, abs=1e-4)
    assert found.metrics["kl"] == pytest.approx(float(kl.mean()), abs=1e-4)
    assert found.metrics["kl_low"] < found.metrics["kl"] < found.metrics["kl_high"]
    assert "kl_full" not in found.metrics, "no server says all of its distribution"
    assert rollout.returns == pytest.approx(rollout.score - 0.3 * kl, abs=1e-3)


def test_greedy_it_is_evaluated_as_the_model_itself_is(served):
    envs = make_envs(4, reference=random_model(seed=1))
    theirs = evaluate(remote(served), envs, PROMPTS, greedy=True)
    ours = evaluate(random_model(), envs, PROMPTS, greedy=True)
    assert theirs.metrics == pytest.approx(ours.metrics)
    assert [row["response"] for row in theirs.samples] == [row["response"] for row in ours.samples]
    for there, here in zip(theirs.samples, ours.samples, strict=True):
        assert there["kl"] == pytest.approx(here["kl"], abs=1e-4)
        assert there["reference_response"] == here["reference_response"]


def test_what_no_server_says_is_left_out_of_the_tokens_numbers(served):
    tokens = evaluate(remote(served), make_envs(4, reference=random_model(seed=1)), PROMPTS).tokens
    for row in tokens:
        assert "ratio" in row["policy"]["numbers"]
        assert "ratio" not in row["reference"]["numbers"]
        assert "kl" in row["reference"]["numbers"]


def test_a_stop_string_ends_its_responses(served):
    rollout = collect(remote(served), make_envs(4, stop_strings=("c",)), 8 * PROMPTS)
    for ids, mask, ended in zip(rollout.response_ids, rollout.response_mask, rollout.ended.tolist(), strict=True):
        response = ids[mask].tolist()
        assert 2 not in response[:-1] and ended == (response[-1] in (2, 9))
    assert (rollout.response_ids == 2).any()


def test_another_vocabulary_is_refused(served):
    policy = RemoteLM(served.url, char_tokenizer("hgfedcba"), SETTINGS)
    with pytest.raises(TokenizerError, match="another vocabulary"):
        collect(policy, make_envs(2), PROMPTS)


def test_generate_writes_what_the_server_says(folder, served, server):
    config = GenerateConfig(
        policy=served.url, prompts=str(folder / "prompts.txt"), env=EnvConfig(max_new_tokens=5), server=server
    )
    rows = generate(replace(config, greedy=True))
    local = GenerateConfig(policy=str(folder / "policy"), prompts=config.prompts, env=config.env, greedy=True)
    assert rows == generate(local)
    sampled = generate(config)
    assert sampled == generate(config) != generate(replace(config, seed=1))
    assert generate(replace(config, env=EnvConfig(max_new_tokens=5, temperature=0.5)))
    assert all(body["model"] == "tiny" for _, body in served.asked)


def test_prefer_compares_what_the_server_says(folder, served, server, tmp_path):
    config = PreferConfig(
        policy=served.url,
        prompts=str(folder / "prompts.txt"),
        gold="tests.builders:letter_score",
        comparisons=6,
        num_envs=3,
        env=EnvConfig(max_new_tokens=4),
        server=server,
    )
    run_prefer(config, tmp_path / "run")
    comparisons = read_comparisons(tmp_path / "run/comparisons.jsonl")
    assert len(comparisons) == 6 and {c.policy for c in comparisons} == {"tiny"}
    assert all(c.prompt in PROMPTS and len(set(c.responses)) == 2 for c in comparisons)
    assert build(PreferConfig, read_layer(tmp_path / "run/config.yaml")) == config


def test_evaluate_leaves_a_run_folder_without_the_token(folder, served, server, tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY, "s3cret-token")
    config = EvaluateConfig(
        policy=served.url,
        prompts=str(folder / "prompts.txt"),
        reward="tests.builders:letter_score",
        reference=str(folder / "policy"),
        best_of=2,
        env=EnvConfig(max_new_tokens=4),
        server=server,
    )
    found = run_evaluation(config, tmp_path / "run")
    assert abs(found.metrics["kl"]) < 1e-4, "the reference has the weights of the served model"
    assert served.headers[-1]["Authorization"] == "Bearer s3cret-token"
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) >= 4 and not any(b"s3cret" in file.read_bytes() for file in files)
    run_evaluation(replace(config, reference=None, best_of=0, env=EnvConfig(temperature=0.7, max_new_tokens=4)))
    with pytest.raises(ConfigError, match="at temperature 0.7 there is no KL"):
        run_evaluation(replace(config, env=EnvConfig(temperature=0.7)))


def test_the_commands_take_a_url(folder, served, server, tmp_path, command):
    given = [f"server.model={server.model}", f"server.tokenizer={server.tokenizer}"]
    code, out, _ = command("generate", "--policy", served.url, "--prompt", "abc", "--max-new-tokens", 3, *given)
    assert code == 0 and out.startswith("abc")
    code, _, err = command("generate", "--policy", served.url, "--prompt", "abc", *given[:1])
    assert code == 1 and err.count("\n") == 1 and "say server.model" in err and "server.tokenizer" in err
    out = tmp_path / "rows.jsonl"
    code, *_ = command("generate", "--policy", served.url, "--prompts", folder / "prompts.txt", "--out", out, *given)
    assert code == 0 and [row["prompt"] for row in read_jsonl(out)] == list(PROMPTS)
    code, _, err = command(
        "generate", "--policy", "http://127.0.0.1:9/v1", "--prompt", "abc", "server.http.attempts=1", *given
    )
    assert code == 1 and err.count("\n") == 1 and "http://127.0.0.1:9/v1/completions cannot be reached" in err


def test_train_refuses_a_server_in_one_line(folder, command, tmp_path):
    words = ["--prompts", folder / "prompts.txt", "--reward", "vader", "--out", tmp_path / "run"]
    code, _, err = command("train", "--policy", "http://host/v1", *words)
    assert code == 1 and err.count("\n") == 1
    assert "http://host/v1 is a server, whose weights train cannot change" in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is a server"):
        TrainConfig(policy="https://host/v1", prompts="p.txt", reward="vader")
    for policy in ("http://host/v1", "https://host"):  # a reference, a body, a model to fine-tune
        with pytest.raises(ConfigError, match="is a server, .* here the weights themselves are needed"):
            CausalLM.from_pretrained(policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"server": ServerConfig()}, "is a server: say server.model"),
        ({"server": ServerConfig(model="tiny")}, "is a server: say server.model"),
        (
            {"policy": "runs/model"},
            "server.model and server.tokenizer are of a policy that is a URL; runs/model is none",
        ),
        ({"env": EnvConfig(top_k=5)}, "top_k, top_p and min_new_tokens mean other things"),
        ({"env": EnvConfig(top_p=0.9)}, "top_k, top_p and min_new_tokens mean other things"),
        ({"env": EnvConfig(min_new_tokens=2)}, "top_k, top_p and min_new_tokens mean other things"),
    ],
)
@pytest.mark.parametrize("kind", [PreferConfig, EvaluateConfig, GenerateConfig])
def test_settings_that_do_not_go_together_are_refused(kind, change, message):
    needed = {"prompts": "p.txt", "policy": "http://host/v1", "server": SETTINGS}
    needed |= {PreferConfig: {"gold": "vader"}, EvaluateConfig: {"reward": "vader"}}.get(kind, {})
    kind(**needed)
    with pytest.raises(ConfigError, match=message):
        kind(**(needed | change))


def test_perplexity_needs_weights():
    with pytest.raises(ConfigError, match="perplexity needs the model's weights"):
        EvaluateConfig(policy="http://host/v1", prompts="p.txt", reward="vader", text="t.txt", server=SETTINGS)


def test_a_prompt_too_long_for_the_reference_is_noticed_before_anything_is_asked(served):
    before = len(served.asked)
    with pytest.raises(PromptTooLongError):
        collect(remote(served), make_envs(2, max_new_tokens=70), PROMPTS)
    assert len(served.asked) == before
