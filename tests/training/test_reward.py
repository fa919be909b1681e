"""The third stage: a reward model that is measured on what it never saw, on a scale that β can count on."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_env.errors import ConfigError, DataError, RewardError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.splits import split_by_prompt
from rlhf_env.records.config import Layer, build, override_layer, read_layer, to_dict
from rlhf_env.records.run import Run
from rlhf_env.reward_models import ClassifierReward, load_reward
from rlhf_env.reward_models.bradley_terry import new_reward_model
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.prompts import prompt_indices
from rlhf_env.text.tokenizers import byte_tokenizer
from rlhf_env.training import reward, reward_kinds
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, NewModelConfig, RewardConfig
from rlhf_env.training.reward import run_reward
from rlhf_env.types import Comparison
from tests.builders import ALPHABET, PROMPTS, letter_score, make_envs
from tests.tiny_files import write_letter_files, write_rows

SMALL = NewModelConfig(tokenizer="byte", n_layer=1, n_embd=16, n_head=2, n_positions=32)
FIT = BradleyTerryConfig(learning_rate=1e-2, epochs=3, batch_size=16)
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def rankings() -> list[Comparison]:
    """Sixty comparisons of random letters over twenty prompts; of two responses the one with more letters a wins."""
    rng = np.random.default_rng(0)
    found = []
    while len(found) < 60:
        first, second = ("".join(rng.choice(list(ALPHABET), 6)) for _ in range(2))
        if lead := first.count("a") - second.count("a"):
            found.append(Comparison(f"{len(found) % 20} ", (first, second), (0, 1) if lead > 0 else (1, 0)))
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RewardConfig:
    """The reference reads letters, the reward model bytes: they share texts, not token ids."""
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    write_comparisons(folder / "comparisons.jsonl", rankings())
    return RewardConfig(
        comparisons=str(folder / "comparisons.jsonl"),
        held_out=0.3,
        reference=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        normalize_on=24,
        gold="tests.builders:letter_score",
        num_envs=8,
        env=EnvConfig(max_new_tokens=5),
        fit=FIT,
        new=SMALL,
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "reward"
    run_reward(config, out)
    return Run.open(out)


@pytest.fixture
def started(monkeypatch) -> dict[str, Any]:
    """The head before anything is learned, and the seed of the order."""
    started, fit = {}, reward_kinds.fit_comparisons

    def spy(model, *args, seed):
        started.update(head=model.model.score.weight.detach().clone(), seed=seed)
        return fit(model, *args, seed=seed)

    monkeypatch.setattr(reward_kinds, "fit_comparisons", spy)
    return started


@pytest.fixture
def learned(monkeypatch) -> list[Comparison]:
    """What the reward model learns from."""
    learned, fit = [], reward_kinds.fit_comparisons

    def spy(model, comparisons, *args, **kwargs):
        learned.extend(comparisons)
        return fit(model, comparisons, *args, **kwargs)

    monkeypatch.setattr(reward_kinds, "fit_comparisons", spy)
    return learned


def alone(config: RewardConfig) -> RewardConfig:
    """Without a reference and without gold: the comparisons are all there is."""
    return replace(config, reference=None, prompts=None, gold=None)


def test_the_loss_is_a_setting_of_the_run(config, tmp_path):
    typed = override_layer(["fit.loss=plackett_luce", "fit.l2=0.01"])
    chosen = build(RewardConfig, Layer("test", to_dict(alone(config))), typed)
    assert (chosen.fit.loss, chosen.fit.l2) == ("plackett_luce", 0.01)
    assert run_reward(chosen, tmp_path / "run")["accuracy"] > 0.5


def test_a_run_leaves_settings_metrics_summary_and_a_reward_model(config, made):
    assert build(RewardConfig, read_layer(made.path / "config.yaml")) == config
    summary = made.summary
    assert summary["comparisons"] + summary["held_out"] == 60
    steps = 3 * math.ceil(summary["comparisons"] / 16)
    assert [row["step"] for row in made.metrics] == list(range(1, steps + 1))
    assert summary["loss_learned"] < math.log(2)
    assert summary["identical"] == 0 and summary["seed"] == 0 and summary["device"] == "cpu"
    stored = json.loads((made.path / "model/config.json").read_text())
    assert (stored["reward_mean"], stored["reward_std"]) == (summary["reward_mean"], summary["reward_std"])
    assert (stored["reward_of"], stored["reward_max_length"]) == ("text", 32)


def test_nothing_is_measured_on_a_prompt_that_was_learned_from(config, made, tmp_path, learned):
    run_reward(config, tmp_path / "out")
    held_out = [c for c in rankings() if c not in learned]
    assert len(learned) + len(held_out) == 60
    assert not {c.prompt for c in learned} & {c.prompt for c in held_out}
    summary = made.summary
    assert (summary["comparisons"], summary["held_out"]) == (42, 18)
    assert (len(held_out), len({c.prompt for c in held_out})) == (18, summary["held_out_prompts"])


def test_the_summary_says_how_well_the_saved_model_does_on_what_was_held_out(config, made, tmp_path, learned):
    run_reward(config, tmp_path / "out")
    held_out = [c for c in rankings() if c not in learned]
    model, summary = ClassifierReward(made.path / "model"), made.summary

    def lead(c: Comparison) -> float:
        """Of the preferred response, in logits."""
        first, second = model.score([c.prompt] * 2, c.responses) * summary["reward_std"]
        return (first - second) * (1 if c.ranks[0] == 0 else -1)

    leads, by_gold, labels_agree = np.array([lead(c) for c in held_out]), [], []
    for c, d in zip(held_out, leads, strict=True):
        gold = letter_score([c.prompt] * 2, list(c.responses))
        labels_agree.append((gold[0] > gold[1]) == (c.ranks[0] == 0))
        by_gold.append(labels_agree[-1] == (d > 0))
    p = 1 / (1 + np.exp(-leads))
    assert summary["accuracy"] == pytest.approx(np.mean(leads > 0))
    assert summary["loss_learned"] == pytest.approx(np.mean([np.logaddexp(0, -lead(c)) for c in learned]), rel=1e-4)
    assert summary["log_loss"] == pytest.approx(-np.log(p).mean(), rel=1e-4)
    assert summary["brier"] == pytest.approx(((1 - p) ** 2).mean(), rel=1e-4)
    assert summary["gold_accuracy"] == pytest.approx(np.mean(by_gold))
    assert summary["label_agreement"] == pytest.approx(np.mean(labels_agree))
    for name in ("accuracy", "gold_accuracy", "label_agreement"):
        assert 0 <= summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"] <= 1
    assert sum(row["count"] for row in summary["reliability"]) == 2 * summary["pairs"] == 2 * 18  # both orders
    gaps = [row["count"] / 36 * abs(row["predicted"] - row["observed"]) for row in summary["reliability"]]
    assert summary["ece"] == pytest.approx(sum(gaps))


def test_comparisons_to_measure_on_may_be_given(config, tmp_path, learned):
    """Then all others are learned from."""
    write_comparisons(tmp_path / "eval.jsonl", rankings()[:7])
    write_comparisons(tmp_path / "learned.jsonl", rankings()[7:])
    given = {"comparisons": str(tmp_path / "learned.jsonl"), "eval_comparisons": str(tmp_path / "eval.jsonl")}
    summary = run_reward(replace(config, **given), tmp_path / "out")
    assert learned == rankings()[7:]
    assert (summary["comparisons"], summary["held_out"], summary["pairs"]) == (53, 7, 7)


def test_one_comparison_is_enough_beside_those_to_measure_on(config, tmp_path, learned):
    names = [tmp_path / f"{name}.jsonl" for name in ("one", "eval", "none")]
    write_comparisons(names[0], rankings()[:1])
    write_comparisons(names[1], rankings()[1:4])
    write_rows(names[2], {"prompt": "p", "chosen": "same", "rejected": "same"})
    one, measured_on, none = map(str, names)
    run_reward(replace(config, comparisons=one, eval_comparisons=measured_on), tmp_path / "out")
    assert learned == rankings()[:1]
    with pytest.raises(
        DataError, match=r"none\.jsonl: of 1 comparisons 0 have responses that differ; at least 1 is needed"
    ):
        run_reward(replace(config, comparisons=none, eval_comparisons=measured_on), tmp_path / "bad")
    with pytest.raises(DataError, match=r"none\.jsonl: of 0 comparisons none has responses that differ"):
        run_reward(replace(config, comparisons=measured_on, eval_comparisons=none), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_bagging_learns_from_as_many_drawn_with_replacement_and_measures_on_the_same(config, made, tmp_path, learned):
    summary = run_reward(replace(config, bagging=True), tmp_path / "out")
    held_out = split_by_prompt(rankings(), config.held_out, config.seed)[1]
    assert (summary["comparisons"], summary["held_out"]) == (42, 18) and len(learned) == 42
    assert all(c in rankings() and c not in held_out for c in learned)
    assert 20 < len(set(learned)) < 36  # 42 · (1 − 1/e) = 26.5 are expected to be drawn at all
    first, learned[:] = list(learned), []
    run_reward(replace(config, bagging=True, seed=1), tmp_path / "other")
    assert learned != first


def test_fresh_responses_of_the_reference_score_mean_0_variance_1(config, made):
    reference = CausalLM.from_pretrained(config.reference)
    asked = [PROMPTS[i] for i in prompt_indices(0, 0, 24, 4)]
    envs = make_envs(5, reference=None, beta=0.0, max_new_tokens=5)
    rollout = collect(reference, envs, asked, seed=reward.SAMPLING_SEED)
    texts = [
        "".join(ALPHABET[token] for token in ids[mask].tolist() if token < 8)
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    scores = ClassifierReward(made.path / "model").score(asked, texts)
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.var() == pytest.approx(1, abs=1e-5)
    assert len(set(texts)) > 12


@pytest.mark.parametrize("of", ["text", "response"])
def test_without_a_reference_the_responses_compared_do(config, tmp_path, of):
    summary = run_reward(replace(alone(config), of=of), tmp_path / "out")
    model = load_reward(str(tmp_path / "out/model"))
    pairs = [(c.prompt, response) for c in rankings() for response in c.responses]
    scores = model.score([prompt for prompt, _ in pairs], [response for _, response in pairs])
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.var() == pytest.approx(1, abs=1e-5)
    same = model.score(["0 ", "1 "], ["abc", "abc"])
    assert (same[0] == same[1]) == (of == "response")
    assert not {"gold_accuracy", "label_agreement"} & summary.keys()


def test_the_same_seed_gives_the_same_bits(config, made, tmp_path):
    rows = []
    run_reward(config, tmp_path / "again", on_step=rows.append)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again/model" / file).read_bytes() == (made.path / "model" / file).read_bytes(), file
    assert rows == made.metrics
    run_reward(replace(config, num_envs=3), tmp_path / "narrower")
    assert Run.open(tmp_path / "narrower").summary["reward_std"] == made.summary["reward_std"]


def test_the_seed_decides_head_order_and_hold_out(config, tmp_path, started):
    for seed in (0, 1):
        run_reward(replace(config, body=config.reference, of="response", seed=seed), tmp_path / str(seed))
        assert started["seed"] == seed
        head = new_reward_model(str(config.reference), seed=seed).model.score.weight
        assert torch.equal(started["head"], head)
    held_out = [{c.prompt for c in split_by_prompt(rankings(), 0.3, seed)[1]} for seed in (0, 1)]
    found = [Run.open(tmp_path / str(seed)).summary["held_out_prompts"] for seed in (0, 1)]
    assert held_out[0] != held_out[1] and found == [len(prompts) for prompts in held_out]


def test_it_learns_what_is_preferred(config, tmp_path):
    long = replace(alone(config), of="response", fit=replace(FIT, epochs=15))
    summary = run_reward(long, tmp_path / "out")
    assert summary["accuracy_low"] > 0.5 and summary["log_loss"] < 0.5


# --- what it may be made from ----------------------------------------------------------------------


def test_the_body_may_be_the_policy_itself(config, tmp_path):
    run_reward(replace(config, body=config.reference, of="response"), tmp_path / "out")
    model = ClassifierReward(tmp_path / "out/model")
    assert len(model.tokenizer) == 11 and model.max_length == 64
    assert load_file(tmp_path / "out/model/model.safetensors")["score.weight"].shape == (1, 32)
    with pytest.raises(RewardError, match="tokenizer cannot read"):  # prompts of digits, which its alphabet lacks
        run_reward(replace(config, body=config.reference), tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("tokenizer", ["word", "char", "byte", "bpe"])
def test_a_new_body_has_a_tokenizer_made_from_the_comparisons(config, tmp_path, tokenizer):
    new = replace(SMALL, tokenizer=tokenizer, vocab_size=300)
    run_reward(replace(alone(config), new=new, fit=replace(FIT, epochs=1)), tmp_path / "out")
    own = ClassifierReward(tmp_path / "out/model").tokenizer
    for c in rankings():
        for response in c.responses:
            assert own.decode(own.encode(c.prompt + response)) == c.prompt + response
    assert len(own) == {"byte": 259, "char": len("0123456789 abcdefgh") + 3}.get(tokenizer, len(own))


def test_a_reference_that_writes_what_the_reward_model_cannot_read_is_met_before_learning(config, tmp_path):
    pairs = [{"prompt": "", "chosen": f"x{'y' * i}", "rejected": f"{'y' * i}z"} for i in range(1, 9)]
    other = replace(
        config, comparisons=write_rows(tmp_path / "xyz.jsonl", *pairs), new=replace(SMALL, tokenizer="char")
    )
    with pytest.raises(RewardError, match="the reward model's tokenizer cannot read"):
        run_reward(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_policy_is_rewarded_for_its_text_not_for_its_token_ids(config, made):
    """PITFALLS: policy and reward model with tokenizers of their own. The policy's "a" is 0, the reward model's 97."""
    policy, model = CausalLM.from_pretrained(config.reference), ClassifierReward(made.path / "model")
    assert policy.tokenizer.encode("abc") != model.tokenizer.encode("abc")
    rollout = collect(policy, make_envs(reference=None, beta=0.0, reward_model=model), list(PROMPTS), seed=3)
    bodies = [
        "".join(ALPHABET[token] for token in ids[mask].tolist() if token < 8)
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    raw = model.model(input_ids=byte_ids(PROMPTS[0] + bodies[0])).logits.item()
    assert rollout.score[0].item() == pytest.approx((raw - model.mean) / model.std, abs=1e-5)
    np.testing.assert_allclose(rollout.score, model.score(list(PROMPTS), bodies), atol=1e-5)


def byte_ids(text: str):
    return byte_tokenizer()(text, return_tensors="pt")["input_ids"]


def test_special_tokens_typed_in_a_comparison_are_text(config, tmp_path):
    rows = [{"prompt": "<bos>", "chosen": f"a{i}<eos>", "rejected": f"<pad>b{i}"} for i in range(8)]
    file = write_rows(tmp_path / "typed.jsonl", *rows)
    run_reward(replace(alone(config), comparisons=file), tmp_path / "out")
    model = ClassifierReward(tmp_path / "out/model")
    assert model.encode(["<bos>"], ["a<eos>"]) == [list(b"<bos>a<eos>")]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_pairs_in_the_forms_of_trl_are_read(config, tmp_path, form):
    rows = []
    for c in rankings():
        better, worse = sorted(c.responses, key=lambda response, c=c: c.ranks[c.responses.index(response)])
        row = {"prompt": c.prompt, "chosen": better, "rejected": worse}
        wrapped = {"prompt": user(c.prompt), "chosen": assistant(better), "rejected": assistant(worse)}
        rows.append(row if form == "standard" else wrapped)
    file = write_rows(tmp_path / "trl.jsonl", *rows)
    summary = run_reward(replace(alone(config), comparisons=file), tmp_path / "out")
    whole = run_reward(alone(config), tmp_path / "ours")
    assert (summary["comparisons"], summary["held_out"]) == (42, 18)
    assert summary["accuracy"] == whole["accuracy"]  # the same comparisons in another form


def test_rankings_of_four_with_ties(config, tmp_path):
    texts = [("aaa", "aa", "a", "b"), ("ab", "b", "c", "aab"), ("d", "aaaa", "e", "a")]
    levels = [[text.count("a") for text in those] for those in texts]
    ranks = [tuple(sorted(set(level), reverse=True).index(n) for n in level) for level in levels]
    file = tmp_path / "rankings.jsonl"
    write_comparisons(file, [Comparison(str(i), t, r) for i, (t, r) in enumerate(zip(texts, ranks, strict=True))])
    summary = run_reward(replace(alone(config), comparisons=str(file)), tmp_path / "out")
    assert (summary["comparisons"], summary["held_out"], summary["pairs"]) == (2, 1, 6)


def test_what_teaches_nothing_is_left_out_and_counted(config, tmp_path):
    """Two of the same text, and three whose ends, all that eight tokens hold, are the same."""
    same = [{"prompt": "p", "chosen": "x", "rejected": "x"}] * 2
    ends = [{"prompt": str(i), "chosen": "a" + "z" * 8, "rejected": "b" + "z" * 8} for i in range(3)]
    rest = [{"prompt": str(i), "chosen": f"{i}a", "rejected": f"{i}b"} for i in range(6)]
    file = write_rows(tmp_path / "pairs.jsonl", *same, *ends, *rest)
    summary = run_reward(replace(alone(config), comparisons=file, max_length=8), tmp_path / "out")
    assert summary["identical"] == 5
    assert summary["comparisons"] + summary["held_out"] == 6
    assert ClassifierReward(tmp_path / "out/model").max_length == 8


def test_soft_labels_strengths_and_several_annotators_are_learned_from(config, tmp_path):
    """Files of other forms, and gold's own ranks, which need not be on the side of the label."""
    soft = [replace(c, preference=0.5 + 0.3 * (c.ranks[1] - c.ranks[0]), strength=2) for c in rankings()]
    write_comparisons(tmp_path / "soft.jsonl", soft)
    rows = [
        {"instruction": c.prompt, "response1": c.responses[0], "response2": c.responses[1]}
        | {f"annotator{number}": label for number, label in enumerate((1 + c.ranks[0], 0, 2), start=1)}
        for c in rankings()
    ]
    write_rows(tmp_path / "annotated.jsonl", *rows)
    for name, count in (("soft", 60), ("annotated", 180)):
        summary = run_reward(replace(config, comparisons=str(tmp_path / f"{name}.jsonl")), tmp_path / name)
        assert summary["comparisons"] + summary["held_out"] == count
        assert 0 <= summary["gold_accuracy"] <= 1 and summary["log_loss"] > 0


@pytest.mark.parametrize("gold", ["constant", "letters"])
def test_gold_that_sees_no_difference_agrees_with_nobody(config, tmp_path, monkeypatch, gold):
    monkeypatch.setattr("tests.builders.constant", lambda prompts, responses: [0.5] * len(prompts), raising=False)
    spec = {"constant": "tests.builders:constant", "letters": config.gold}[gold]
    summary = run_reward(replace(config, gold=spec), tmp_path / "out")
    known = {"gold_accuracy", "gold_accuracy_low", "gold_accuracy_high", "label_agreement"}
    assert known & summary.keys() == (known if gold == "letters" else set())


# --- what is refused -------------------------------------------------------------------------------

GOOD = json.dumps(PAIR)
BAD = {
    "a malformed row": ([GOOD, '{"prompt": "p", "chosen": "a"'], r"bad\.jsonl:2:\d+: malformed JSON"),
    "a trailing comma": ([GOOD, '{"prompt": "p", "chosen": "a", "rejected": "b",}'], r"bad\.jsonl:2:\d+: malformed"),
    "no object": ([GOOD, '["p", "a", "b"]'], r"bad\.jsonl:2: a JSON object was expected, this is a list"),
    "an empty file": ([], r"bad\.jsonl: the file is empty"),
    "NaN": ([GOOD, '{"prompt": "p", "chosen": "a", "rejected": NaN}'], r"bad\.jsonl:2: NaN is no JSON"),
    "NaN as a rank": ([{"prompt": "p", "responses": ["a", "b"], "ranks": [0, math.nan]}], r"bad\.jsonl:1: NaN is no"),
    "a key twice": ([GOOD, '{"prompt": "p", "chosen": "a", "chosen": "b"}'], r"bad\.jsonl:2: the key 'chosen' occurs"),
    "a lone surrogate": ([GOOD, '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'], r"bad\.jsonl:2: half of a "),
    "a number for a text": ([GOOD, PAIR | {"chosen": 7}], r"bad\.jsonl:2: 'chosen' must be a string, it is an integer"),
    "null for a text": ([GOOD, PAIR | {"rejected": None}], r"bad\.jsonl:2: 'rejected' must be a string, it is null"),
    "a missing key": ([GOOD, {"prompt": "p", "chosen": "a"}], r"bad\.jsonl:2: the key 'rejected' is missing"),
    "a gap in the ranks": ([{"prompt": "p", "responses": ["a", "b"], "ranks": [0, 2]}], r"bad\.jsonl:1: the ranks of"),
    "two forms": ([GOOD, {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}], r"bad\.jsonl:2: .* one form"),
    "one row": ([GOOD], r"bad\.jsonl: of 1 comparisons 1 have responses that differ; at least 2 are needed"),
    "identical pairs": (
        [PAIR | {"rejected": "good"}] * 3,
        r"bad\.jsonl: of 3 comparisons 0 have responses that differ",
    ),
    "identical pairs but one": ([GOOD, PAIR | {"rejected": "good"}], r"bad\.jsonl: of 2 comparisons 1 have"),
    "identical once cut": (
        [{"prompt": "p", "chosen": f"{i}" + "z" * 8, "rejected": "y" + "z" * 8} for i in range(3)],
        r"bad\.jsonl: of 3 comparisons none has responses that differ in the 8 tokens",
    ),
    "identical once cut but one": (
        [GOOD, {"prompt": "p", "chosen": "x" + "z" * 8, "rejected": "y" + "z" * 8}],
        r"bad\.jsonl: at least two comparisons are needed.* this is 1",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_comparisons_are_named_and_leave_no_folder(config, tmp_path, what):
    rows, message = BAD[what]
    file = write_rows(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(DataError, match=message) as caught:
        run_reward(replace(alone(config), comparisons=file, max_length=8), tmp_path / "out")
    assert str(caught.value).startswith(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"comparisons": "no.jsonl"}, DataError, r"no\.jsonl: No such file"),
        ({"comparisons": "pairs.csv"}, DataError, r"pairs\.csv: data are \.jsonl files"),
        ({"prompts": "no.txt"}, DataError, r"no\.txt: No such file"),
        ({"reference": "./no-model"}, ConfigError, "there is no folder ./no-model"),
        ({"body": "./no-model"}, ConfigError, "there is no folder ./no-model"),
        ({"gold": "vadr"}, ConfigError, "Did you mean 'vader'"),
        ({"max_length": 0}, ConfigError, "max_length must be at least 1"),
        ({"of": "both"}, ConfigError, "of must be 'text' or 'response'"),
        ({"device": "cuda:99"}, ConfigError, "device 'cuda:99' cannot be used"),
        ({"env": EnvConfig(max_new_tokens=64)}, ValueError, "exceed the model's context of 64"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_mistake_leaves_no_folder(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_reward(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(config, made):
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_reward(config, made.path)
