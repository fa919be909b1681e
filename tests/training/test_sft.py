"""The first stage: a policy from demonstrations, of which some are measured on and never learned from."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.config import build, read_layer
from rlhf_env.records.run import Run
from rlhf_env.settings import SFTConfig
from rlhf_env.text.corpus import film_reviews
from rlhf_env.training import sft
from rlhf_env.training.config import FineTuneConfig, NewModelConfig
from rlhf_env.training.sft import new_model, run_sft
from tests.tiny_files import write_letter_files, write_rows

REVIEWS = film_reviews()[:60]
SMALL = NewModelConfig(tokenizer="byte", n_layer=1, n_embd=16, n_head=2)
FIT = SFTConfig(learning_rate=1e-2, epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> FineTuneConfig:
    file = tmp_path_factory.mktemp("texts") / "reviews.txt"
    file.write_text("\n".join(REVIEWS), encoding="utf-8")
    return FineTuneConfig(demonstrations=str(file), held_out=0.2, fit=FIT, new=SMALL)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "sft"
    run_sft(config, out)
    return Run.open(out)


@pytest.fixture
def seen(monkeypatch):
    """What is learned from and what is measured on, as texts of the byte tokenizer; the first weights and the seed."""
    seen: dict[str, Any] = {}

    def texts(rows):
        return [bytes(row.ids[:-1]).decode() for row in rows]

    def spy(name, measure):
        def call(policy, rows, *args, **kwargs):
            seen[name] = texts(rows)
            if name == "learned":
                seen.update(seed=kwargs["seed"], start=weights_of(policy))
            return measure(policy, rows, *args, **kwargs)

        return call

    monkeypatch.setattr(sft, "fit_demonstrations", spy("learned", sft.fit_demonstrations))
    monkeypatch.setattr(sft, "mean_nll", spy("held_out", sft.mean_nll))
    return seen


def weights_of(policy: CausalLM) -> torch.Tensor:
    """All of them, as one vector."""
    return torch.cat([weight.detach().flatten() for weight in policy.model.parameters()])


def shape_of(policy: CausalLM) -> Any:
    """The model's config.json."""
    return policy.model.config


def test_a_run_leaves_settings_metrics_summary_and_a_policy(config, made):
    assert build(FineTuneConfig, read_layer(made.path / "config.yaml")) == config
    assert [row["step"] for row in made.metrics] == [1, 2, 3, 4, 5, 6]  # 48 demonstrations in batches of 16, twice
    assert all(row["steps"] == 6 and math.isfinite(row["loss"]) for row in made.metrics)
    summary = made.summary
    assert (summary["demonstrations"], summary["held_out"], summary["dropped"]) == (48, 12, 0)
    # embeddings 259·16 and 128·16, one block 4·16² + 4·16 + 8·16² + 5·16 + 4·16, last norm 32; the head is tied
    assert summary["parameters"] == 259 * 16 + 128 * 16 + 12 * 256 + 13 * 16 + 32
    assert summary["seed"] == 0 and summary["device"] == "cpu" and summary["versions"]["torch"] == torch.__version__
    policy = CausalLM.from_pretrained(made.path / "model")
    assert (policy.tokenizer.eos_token_id, shape_of(policy).eos_token_id) == (257, 257)


def test_the_loss_is_that_of_the_saved_policy_on_what_was_held_out(config, tmp_path, seen):
    summary = run_sft(config, tmp_path / "out")
    policy = CausalLM.from_pretrained(tmp_path / "out/model")
    total, count = 0.0, 0
    for text in seen["held_out"]:
        ids = torch.tensor([[*text.encode(), 257]])
        logits = policy.model(ids).logits[0, :-1].log_softmax(-1)
        total -= logits.gather(-1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1  # nothing predicts the first byte of a text
    assert summary["loss_after"] == pytest.approx(total / count, abs=1e-5)
    assert summary["loss_before"] == pytest.approx(math.log(259), abs=0.05)  # random weights know nothing
    assert summary["loss_after"] < summary["loss_before"] - 0.5


def test_what_is_held_out_is_never_learned_from(config, tmp_path, seen):
    run_sft(config, tmp_path / "first")
    learned, held_out = seen["learned"], seen["held_out"]
    assert (len(learned), len(held_out)) == (48, 12)
    assert sorted(learned + held_out) == sorted(REVIEWS)
    assert learned == [r for r in REVIEWS if r in learned] and held_out == [r for r in REVIEWS if r in held_out]
    run_sft(replace(config, fit=replace(FIT, learning_rate=1e-3)), tmp_path / "again")
    assert (seen["learned"], seen["held_out"]) == (learned, held_out)  # the seed decides, and nothing else


def test_a_text_that_occurs_twice_is_on_one_side_only(config, tmp_path, seen):
    twice = tmp_path / "twice.txt"
    twice.write_text("\n".join(REVIEWS[:20] * 2))
    summary = run_sft(replace(config, demonstrations=str(twice)), tmp_path / "out")
    assert not set(seen["learned"]) & set(seen["held_out"])
    assert (summary["demonstrations"], summary["held_out"]) == (32, 8)


def test_the_same_seed_gives_the_same_bits(config, made, tmp_path):
    rows = []
    run_sft(config, tmp_path / "again", on_step=rows.append)
    for file in ("model.safetensors", "value_head.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again/model" / file).read_bytes() == (made.path / "model" / file).read_bytes(), file
    assert rows == made.metrics == Run.open(tmp_path / "again").metrics


def test_the_seed_decides_new_weights_order_and_hold_out(config, tmp_path, seen):
    start = {}
    for seed in (0, 1):
        run_sft(replace(config, seed=seed, fit=replace(FIT, epochs=1)), tmp_path / str(seed))
        assert seen["seed"] == seed
        assert torch.equal(seen["start"], weights_of(new_model(SMALL, [], seed, "cpu", "float32")))
        start[seed] = (seen["start"], seen["held_out"])
    assert not torch.equal(start[0][0], start[1][0]) and start[0][1] != start[1][1]


# --- where it starts -------------------------------------------------------------------------------

FIRST = "for an hour the cast is stupid, but then it becomes excellent."
PIECES = {
    "byte": list(FIRST),
    "char": list(FIRST),
    "word": ("for| an| hour| the| cast| is| stupid|,| but| then| it| becomes| excellent|.".split("|")),
}


@pytest.mark.parametrize("tokenizer", ["word", "char", "byte", "bpe"])
def test_a_new_policy_has_a_tokenizer_made_from_the_texts(config, tmp_path, tokenizer):
    new = replace(SMALL, tokenizer=tokenizer, vocab_size=300)
    summary = run_sft(replace(config, new=new, fit=replace(FIT, epochs=1)), tmp_path / "out")
    assert summary["loss_after"] < summary["loss_before"]
    policy = CausalLM.from_pretrained(tmp_path / "out/model")
    own = policy.tokenizer
    assert all(own.decode(own.encode(text)) == text for text in REVIEWS)  # also those held out: no unknown word
    assert REVIEWS[0] == FIRST
    pieces = [own.decode([token]) for token in own.encode(FIRST)]
    assert pieces == PIECES.get(tokenizer, pieces)
    size = shape_of(policy).vocab_size
    assert size == len(own) == {"byte": 259, "char": len(set("".join(REVIEWS))) + 3, "bpe": 300}.get(tokenizer, size)
    assert (tokenizer == "bpe") == (len(PIECES["word"]) < len(pieces) < len(FIRST))
    for name in ("bos", "eos", "pad"):
        assert getattr(shape_of(policy), f"{name}_token_id") == own.convert_tokens_to_ids(f"<{name}>")


def test_a_new_policy_has_the_architecture_that_is_asked_for(config, tmp_path):
    new = NewModelConfig("byte", family="llama", n_layer=3, n_embd=24, n_head=3, n_positions=100)
    run_sft(replace(config, new=new, fit=replace(FIT, epochs=1), dtype="float64"), tmp_path / "out")
    policy = CausalLM.from_pretrained(tmp_path / "out/model")
    shape = shape_of(policy)
    assert (shape.model_type, shape.num_hidden_layers, shape.hidden_size) == ("llama", 3, 24)
    assert (shape.num_attention_heads, policy.context_length) == (3, 100)
    weights = load_file(tmp_path / "out/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float64}


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="tokenizer must be 'bpe', 'word', 'char' or 'byte', got 'words'"):
        new_model(replace(SMALL, tokenizer="words"), ["a"], 0, "cpu", "float32")
    with pytest.raises(ConfigError, match="family must be 'gpt2' or 'llama', got 'bert'"):
        new_model(replace(SMALL, family="bert"), ["a"], 0, "cpu", "float32")


def test_a_policy_that_is_given_is_taken_with_its_tokenizer_and_what_is_frozen_stays(tmp_path):
    policy = str(write_letter_files(tmp_path) / "policy")
    texts = tmp_path / "texts.txt"
    texts.write_text("abcd\nabcdefgh\nabc\nabcde\nbcde\ncdef\n")
    config = FineTuneConfig(str(texts), policy=policy, held_out=0.3, freeze_layers=1, fit=FIT)
    summary = run_sft(config, tmp_path / "out")
    assert summary["loss_before"] > math.log(11)  # its weights are large and wrong
    assert summary["loss_before"] > summary["loss_after"]
    start, end = (load_file(f"{folder}/model.safetensors") for folder in (policy, tmp_path / "out/model"))
    kept = {name for name in start if torch.equal(start[name], end[name])}
    assert {name.split(".")[1] for name in kept} == {"wte", "wpe", "h"}
    assert {name.split(".")[2] for name in kept if ".h." in name} == {"0"}
    assert any(".h.1." in name for name in start.keys() - kept)
    assert len(CausalLM.from_pretrained(tmp_path / "out/model").tokenizer) == 11


def test_of_a_prompt_and_its_response_the_response_is_learned(config, tmp_path, seen):
    rows = [{"prompt": "ab" * i, "response": "x" * (i + 1)} for i in range(1, 11)]
    file = write_rows(tmp_path / "pairs.jsonl", *rows)
    summary = run_sft(replace(config, demonstrations=file), tmp_path / "out")
    assert (summary["demonstrations"], summary["held_out"]) == (8, 2)
    responses = [text.strip("ab") for text in seen["learned"]]
    assert Run.open(tmp_path / "out").metrics[0]["tokens"] == sum(len(r) + 1 for r in responses)  # each with its EOS
    assert sorted(seen["learned"] + seen["held_out"]) == sorted(row["prompt"] + row["response"] for row in rows)


# --- what is refused -------------------------------------------------------------------------------


def test_what_is_too_long_is_named_before_anything_is_written_or_dropped_and_counted(config, tmp_path):
    short = replace(config, new=replace(SMALL, n_positions=70))
    long = [text for text in REVIEWS if len(text) + 1 > 70]  # EOS included
    assert len(long) == 13 and REVIEWS.index(long[0]) == 4 and len(long[0]) == 72
    with pytest.raises(DataError, match=r"reviews\.txt:5: 73 tokens.* context of 70; 13 of 60 .*too_long=drop"):
        run_sft(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = run_sft(replace(short, too_long="drop"), tmp_path / "out")
    assert (summary["demonstrations"], summary["held_out"], summary["dropped"]) == (38, 9, 13)


def test_one_demonstration_cannot_be_both_learned_from_and_measured_on(config, tmp_path):
    (tmp_path / "one.txt").write_text("the film is good.\n")
    few = replace(config, demonstrations=str(tmp_path / "one.txt"))
    with pytest.raises(DataError, match=r"one\.txt: of 1 different demonstrations .* at least 2 are needed"):
        run_sft(few, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "one.txt").write_text("the film is good.\nthe film is bad.\n")
    summary = run_sft(replace(few, held_out=0.05), tmp_path / "out")
    assert (summary["demonstrations"], summary["held_out"]) == (1, 1)


def test_a_folder_that_holds_something_is_left_alone(config, made):
    before = sorted(made.path.rglob("*"))
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_sft(config, made.path)
    assert sorted(made.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"demonstrations": "no.txt"}, DataError, r"no\.txt: No such file"),
        ({"policy": "./no-model"}, ConfigError, "there is no folder ./no-model"),
        ({"device": "cuda:99"}, ConfigError, "device 'cuda:99' cannot be used"),
        ({"chat_template": "no.jinja"}, ConfigError, "chat_template must be auto, none or a Jinja file"),
        ({"freeze_layers": 2}, ConfigError, "cannot freeze 2 of 1 layers"),
        ({"new": replace(SMALL, tokenizer="bpe", vocab_size=200)}, ConfigError, "at least 259 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_leaves_no_folder(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_sft(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
