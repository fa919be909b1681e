"""The second stage: what is asked of a labeler, in which order, and what is kept of the answers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.preferences.labelers import SimulatedLabeler
from rlhf_env.records.config import Layer, build, override_layer, read_layer, to_dict
from rlhf_env.records.run import Run
from rlhf_env.settings import LabelerConfig
from rlhf_env.training import inference, labelers, pipeline, prefer, reward
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, PreferConfig
from rlhf_env.training.labeler_config import MemberConfig
from rlhf_env.training.prefer import ask, run_prefer
from rlhf_env.types import Comparison
from tests.builders import ALPHABET, PROMPTS, letter_score, make_envs
from tests.tiny_files import write_letter_files

SURE = LabelerConfig(temperature=0.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PreferConfig:
    folder = write_letter_files(tmp_path_factory.mktemp("letters"))
    return PreferConfig(
        policy=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        gold="tests.builders:letter_score",
        comparisons=12,
        num_envs=8,
        env=EnvConfig(max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "prefer"
    run_prefer(config, out)
    return Run.open(out)


def comparisons_of(config: PreferConfig, out) -> list[Comparison]:
    run_prefer(config, out)
    return read_comparisons(out / "comparisons.jsonl")


def test_a_run_leaves_settings_summary_and_as_many_comparisons_as_were_asked_for(config, made):
    assert build(PreferConfig, read_layer(made.path / "config.yaml")) == config
    comparisons, summary = read_comparisons(made.path / "comparisons.jsonl"), made.summary
    assert len(comparisons) == summary["comparisons"] == 12
    assert summary["queries"] - summary["identical"] == 12
    assert summary["responses"] == 2
    assert summary["prompts"] == len({c.prompt for c in comparisons}) <= 4
    for c in comparisons:
        assert c.prompt in PROMPTS and len(set(c.responses)) == 2
        assert all(len(response) <= 4 and set(response) <= set(ALPHABET) for response in c.responses)
        assert (c.policy, c.time) == (config.policy, None)
        assert c.labeler.startswith(f"simulated: {config.gold}, temperature {config.labeler.temperature}, flip rate ")
    agree = [letter_score([c.prompt] * 2, list(c.responses)) for c in comparisons]
    right = [(u[0] > u[1]) == (c.ranks[0] < c.ranks[1]) for u, c in zip(agree, comparisons, strict=True)]
    assert summary["label_agreement"] == pytest.approx(sum(right) / 12)  # no two scores are equal here


def test_each_prompt_is_asked_about_once_before_any_is_asked_about_again(config, tmp_path):
    comparisons = comparisons_of(replace(config, env=EnvConfig(max_new_tokens=8), responses=3, comparisons=8), tmp_path)
    assert Run.open(tmp_path).summary["identical"] == 0  # eight letters hardly ever come out alike
    for epoch in (comparisons[:4], comparisons[4:]):
        assert {c.prompt for c in epoch} == set(PROMPTS)


def test_a_query_depends_on_the_seed_and_its_number_alone(config, made, tmp_path):
    whole = read_comparisons(made.path / "comparisons.jsonl")
    assert comparisons_of(replace(config, num_envs=3), tmp_path / "narrower") == whole
    short = replace(config, env=EnvConfig(max_new_tokens=1, temperature=0.3), comparisons=9)
    nine, five = (comparisons_of(replace(short, comparisons=n), tmp_path / str(n)) for n in (9, 5))
    assert nine[:5] == five
    for n in ("9", "5"):  # so the two have asked in several portions, and not the same ones
        assert Run.open(tmp_path / n).summary["identical"] > 1
    file = "comparisons.jsonl"
    run_prefer(config, tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == (made.path / file).read_bytes()


def test_the_responses_are_the_policys_in_the_environment_of_the_settings(config, tmp_path):
    """Each query's K responses are K episodes of `collect`, number K·q and those that follow."""
    sharp = replace(config, seed=1, comparisons=3, responses=3, env=EnvConfig(max_new_tokens=6, temperature=1.5))
    comparisons = comparisons_of(sharp, tmp_path / "out")
    policy = CausalLM.from_pretrained(config.policy)
    envs = make_envs(2, reference=None, beta=0.0, temperature=1.5)
    asked = [c.prompt for c in comparisons for _ in range(3)]
    rollout = collect(policy, envs, asked, seed=1 + prefer.SAMPLING_SEED)
    texts = [
        "".join(ALPHABET[token] for token in ids[mask].tolist() if token < 8)
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    assert [text for c in comparisons for text in c.responses] == texts
    labeler = SimulatedLabeler(letter_score, config.labeler, seed=1, name=comparisons[0].labeler)
    for query, c in enumerate(comparisons):  # none was left out, so this is their number
        assert [c] == ask(labeler, [c.prompt], [c.responses], [query], policy=config.policy, seed=1)
        assert [c] != ask(labeler, [c.prompt], [c.responses], [query + 3], policy=config.policy, seed=1)


def test_no_stage_meets_the_random_numbers_of_another():
    seeds = [0, prefer.SAMPLING_SEED, reward.SAMPLING_SEED, pipeline.EVALUATION_SEED]
    seeds += [inference.BEST_OF_SEED, pipeline.EVALUATION_SEED + inference.BEST_OF_SEED]
    assert min(abs(a - b) for i, a in enumerate(seeds) for b in seeds[:i]) >= 30  # as many seeds of a user are apart


# --- the labeler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4])
def test_a_labeler_without_noise_ranks_as_gold_does(config, tmp_path, k):
    comparisons = comparisons_of(replace(config, labeler=SURE, responses=k), tmp_path)
    for c in comparisons:
        u = letter_score([c.prompt] * k, list(c.responses))
        assert len(c.ranks) == k
        for i, j, preference in c.pairs:
            assert preference == (0.5 if u[i] == u[j] else float(u[i] > u[j]))
    summary = Run.open(tmp_path).summary
    assert summary["label_agreement"] == summary["label_agreement_high"] == 1


def test_a_labeler_who_errs_always_turns_every_ranking_upside_down(config, tmp_path):
    right = replace(config, labeler=SURE, responses=3)
    wrong = replace(right, labeler=replace(SURE, flip_rate=1.0))
    pairs = zip(comparisons_of(right, tmp_path / "right"), comparisons_of(wrong, tmp_path / "wrong"), strict=True)
    for up, down in pairs:
        assert (up.prompt, up.responses, up.order) == (down.prompt, down.responses, down.order)
        assert tuple(max(up.ranks) - rank for rank in up.ranks) == down.ranks
    assert Run.open(tmp_path / "wrong").summary["label_agreement"] == 0


class PrefersTheFirst:
    """Ranks responses in the order in which they are shown, and remembers what that was."""

    name = "first"

    def __init__(self) -> None:
        self.shown: list[tuple[str, ...]] = []
        self.queries: list[int] = []

    def rank(self, prompts, responses, queries):
        self.shown += map(tuple, responses)
        self.queries += queries
        return [tuple(range(len(those))) for those in responses]


@pytest.fixture
def first(monkeypatch) -> PrefersTheFirst:
    """The labeler of a run, whatever its settings say."""
    labeler = PrefersTheFirst()
    monkeypatch.setattr(labelers, "SimulatedLabeler", lambda *args, **kwargs: labeler)
    return labeler


def test_ranks_are_of_the_responses_and_not_of_the_order_they_are_shown_in(config, tmp_path, first):
    comparisons = comparisons_of(replace(config, responses=3, comparisons=30), tmp_path)
    assert {c.labeler for c in comparisons} == {"first"}
    for c, shown in zip(comparisons, first.shown, strict=True):
        assert c.order is not None and sorted(c.order) == [0, 1, 2]
        assert tuple(c.responses[i] for i in c.order) == shown
        assert [c.ranks[i] for i in c.order] == [0, 1, 2]  # the first shown is the best, wherever it was sampled
    assert len({c.order for c in comparisons}) == 6  # every order occurs


def test_what_is_asked_by_hand():
    labeler = PrefersTheFirst()
    answered = ask(labeler, ["p", "q"], [("a", "b"), ("x", "y", "z")], [7, 3], policy="sft", seed=2)
    assert labeler.queries == [7, 3]
    for c, shown in zip(answered, labeler.shown, strict=True):
        assert c.policy == "sft" and c.order is not None
        assert tuple(sorted(c.responses, key=lambda response: c.ranks[c.responses.index(response)])) == shown
    (alone,) = ask(PrefersTheFirst(), ["q"], [("x", "y", "z")], [3], policy="sft", seed=2)
    assert alone == answered[1]  # the order in which it is shown depends on the seed and the query alone
    orders = {ask(PrefersTheFirst(), ["q"], [("x", "y", "z")], [q], seed=2)[0].order for q in range(40)}
    assert len(orders) == 6
    assert ask(labeler, [], [], []) == []


# --- several labelers, biases, skips ---------------------------------------------------------------

TWO = (
    MemberConfig(weight=3.0, labeler=SURE),
    MemberConfig(gold="tests.builders:letter_score", biases={"log_words": 0.5}),
)


def test_what_a_labeler_skips_is_asked_counted_and_made_up_for(config, tmp_path):
    picky = replace(config, labeler=LabelerConfig(temperature=0.0, skip_below=0.0))
    comparisons = comparisons_of(picky, tmp_path)
    summary = Run.open(tmp_path).summary
    assert len(comparisons) == summary["comparisons"] == 12
    assert summary["asked"] == summary["queries"] - summary["identical"] == 12 + summary["skipped"]
    assert summary["skipped"] > 0
    assert all(max(letter_score([c.prompt] * 2, list(c.responses))) >= 0 for c in comparisons)
    assert "skip below 0.0" in comparisons[0].labeler
    with pytest.raises(DataError, match=r"\d\d queries brought only 0 answers.*lower skip_below"):
        run_prefer(replace(config, labeler=LabelerConfig(skip_below=1e6)), tmp_path / "never")


def test_several_labelers_share_the_queries(config, made, tmp_path):
    comparisons = comparisons_of(replace(config, labelers=TWO, comparisons=40), tmp_path)
    by = Counter(c.labeler for c in comparisons)
    first, second = sorted(by)
    assert first.startswith(f"0 simulated: {config.gold}, temperature 0.0, flip rate 0.0, seed ")
    assert second.startswith(f"1 simulated: {config.gold} +0.5 log_words, temperature 0.25, flip rate 0.0, seed ")
    assert by[first] > by[second] > 0
    alone = read_comparisons(made.path / "comparisons.jsonl")
    assert [(c.prompt, c.responses, c.order) for c in comparisons[:12]] == [
        (c.prompt, c.responses, c.order) for c in alone
    ]
    for c in comparisons:
        if c.labeler == first:
            u = letter_score([c.prompt] * 2, list(c.responses))
            assert (u[0] > u[1]) == (c.ranks[0] < c.ranks[1])


def test_with_overlap_each_query_is_answered_by_several(config, tmp_path):
    comparisons = comparisons_of(replace(config, labelers=TWO, overlap=2, comparisons=11), tmp_path)
    assert len(comparisons) == 12 == Run.open(tmp_path).summary["asked"]
    for one, other in zip(comparisons[::2], comparisons[1::2], strict=True):
        assert (one.prompt, one.responses, one.order) == (other.prompt, other.responses, other.order)
        assert one.labeler != other.labeler


def test_labelers_and_biases_from_a_file_and_the_command_line(config):
    given = to_dict(replace(config, labelers=TWO, overlap=2))
    assert build(PreferConfig, Layer("a file", given)) == replace(config, labelers=TWO, overlap=2)
    plain = Layer("a file", {"policy": "p", "prompts": "t", "gold": "vader"})
    typed = override_layer(["labelers=[{weight: 3, labeler: {temperature: 0.0}}, {biases: {log_words: 1}}]"])
    assert build(PreferConfig, plain, typed).labelers[0] == TWO[0]
    assert build(PreferConfig, plain, override_layer(["biases.sycophancy=1"])).biases == {"sycophancy": 1.0}
    with pytest.raises(ConfigError, match=r"no setting labelers\[1\]\.wait; did you mean labelers\[1\]\.weight"):
        build(PreferConfig, plain, override_layer(["labelers=[{}, {wait: 1}]"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelers": TWO, "labeler": SURE}, "one labeler .* or several"),
        ({"labelers": TWO, "biases": {"log_words": 1.0}}, "one labeler .* or several"),
        ({"overlap": 2}, "overlap is 2, but there are 1 labelers"),
        ({"labelers": TWO, "overlap": 3}, "overlap is 3, but there are 2 labelers"),
        ({"labelers": (MemberConfig(weight=0.0),)}, "weights of labelers must be"),
        ({"biases": {"lenght": 1.0}}, "'lenght' is no bias: choose among log_words, markdown_marks, sycophancy"),
        ({"labelers": (MemberConfig(gold="vadr"),)}, "Did you mean 'vader'"),
    ],
)
def test_labelers_that_cannot_be_leave_no_folder(config, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_prefer(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- identical responses ---------------------------------------------------------------------------


def test_identical_responses_are_not_asked_about_and_counted(config, tmp_path, first):
    short = replace(config, env=EnvConfig(max_new_tokens=1), comparisons=20)
    comparisons = comparisons_of(short, tmp_path)
    summary = Run.open(tmp_path).summary
    assert len(comparisons) == len(first.queries) == len(set(first.queries)) == 20
    assert summary["identical"] == summary["queries"] - 20 > 3
    assert first.queries == sorted(first.queries) and first.queries[-1] < summary["queries"]
    assert all(len(set(shown)) == 2 for shown in first.shown)


def test_a_ranking_is_asked_about_where_two_of_its_responses_differ(config, tmp_path):
    comparisons = comparisons_of(replace(config, env=EnvConfig(max_new_tokens=1), responses=4), tmp_path)
    assert {len(set(c.responses)) for c in comparisons} >= {2, 3}
    assert all(len(c.responses) == len(c.ranks) == 4 for c in comparisons)


def test_a_policy_that_always_writes_the_same_is_an_error_with_a_remedy(config, tmp_path):
    frozen = replace(config, env=EnvConfig(max_new_tokens=4, temperature=1e-3))
    with pytest.raises(
        DataError, match=r"of 48 queries only \d .*writes the same; raise env\.temperature, or give mor"
    ):
        run_prefer(frozen, tmp_path / "out")
    assert not Run(tmp_path / "out").finished and not (tmp_path / "out/comparisons.jsonl").exists()


# --- the rest --------------------------------------------------------------------------------------


def test_progress_counts_every_response(config, tmp_path):
    told = []
    summary = run_prefer(
        replace(config, responses=3), tmp_path / "out", progress=lambda more, of: told.append((more, of))
    )
    assert sum(more for more, _ in told) == 3 * summary["queries"]
    assert {of for _, of in told} == {36}


def test_nothing_depends_on_or_disturbs_the_global_random_numbers(config, made, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert comparisons_of(config, tmp_path) == read_comparisons(made.path / "comparisons.jsonl")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "no.txt"}, DataError, r"no\.txt: No such file"),
        ({"policy": "./no-model"}, ConfigError, "there is no folder ./no-model"),
        ({"gold": "vadr"}, ConfigError, "Did you mean 'vader'"),
        ({"device": "cuda:99"}, ConfigError, "device 'cuda:99' cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_leaves_no_folder(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_prefer(replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(config, made):
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_prefer(config, made.path)
