"""Sampling responses: a limit for each prompt, and top-k and top-p as the reference judges them.

That sampling equals uncached decoding and does not depend on rows or neighbours is shown in `test_decoding.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_env.functional import inverse_cdf_sample
from rlhf_env.models.sampling import Samples, sample_responses
from rlhf_env.types import SamplingLaw
from tests.builders import random_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 1, 2, 3, 4], [2, 2], [7, 1], [3]]
LAW = SamplingLaw(11, 9, min_new_tokens=1)
CUT = SamplingLaw(11, 9, min_new_tokens=1, temperature=1.4, top_k=5, top_p=0.8)


def sample(law: SamplingLaw = LAW, *, rows: int = 2, limit=8, policy=None, prompts=PROMPTS, **kwargs) -> Samples:
    policy = policy or random_model(dtype="float64", seed=1)
    seeds = [[0, i] for i in range(len(prompts))]
    return sample_responses(policy, prompts, law, max_new_tokens=limit, seeds=seeds, num_rows=rows, **kwargs)


def responses(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.response_ids, samples.response_mask, strict=True)]


def test_every_prompt_has_a_limit_of_its_own():
    whole = responses(sample(limit=8))
    limits = [3, 8, 1, 2, 5, 8]
    cut = sample(limit=limits)
    assert responses(cut) == [response[:limit] for response, limit in zip(whole, limits, strict=True)]
    for response, limit, ended in zip(responses(cut), limits, cut.ended.tolist(), strict=True):
        assert ended == (response[-1] == 9) and (ended or len(response) == limit)
    assert responses(sample(limit=limits, rows=6)) == responses(cut)


def test_stop_is_told_the_prompt_and_the_response_so_far():
    told = []
    drawn = sample(
        limit=3, rows=1, prompts=[[1, 2]], law=SamplingLaw(11, None), stop=lambda *a: told.append(a) or False
    )
    ids = responses(drawn)[0]
    assert told == [([1, 2], ids[:n]) for n in (1, 2, 3)]
    assert not drawn.ended.any()


def test_progress_is_told_of_every_response_once():
    told = []
    sample(progress=told.append)
    assert sum(told) == len(PROMPTS)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_truncated_it_draws_from_the_policy_among_what_the_reference_leaves(rows):
    """Against each state's logits, the reference's and the policy's, from the Hugging Face models alone."""
    policy, reference = random_model(dtype="float64", seed=1), random_model(dtype="float64")
    drawn = sample(CUT, rows=rows, reference=reference)
    assert drawn.candidates is not None and drawn.candidates.shape == (*drawn.response_ids.shape, 4)  # the widest
    assert len({len(r) for r in responses(drawn)}) > 1, "rows must be refilled"
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses(drawn), strict=True)):
        uniform = np.random.default_rng([0, i]).random(8, dtype=np.float32)
        for t, token in enumerate(response):
            ids = torch.tensor([[*prompt, *response[:t]]])
            with torch.no_grad():
                own, theirs = (m.model(ids).logits[0, -1] / 1.4 for m in (policy, reference))  # type: ignore[operator]
            if t == 0:
                own[9] = theirs[9] = -torch.inf
            order = theirs.argsort(descending=True)[:5]
            share = theirs[order].softmax(-1)
            kept = order[share.cumsum(-1) - share < 0.8].tolist()
            assert drawn.candidates[i, t].tolist() == kept + [-1] * (4 - len(kept))
            p = torch.zeros(11, dtype=torch.float64)
            p[kept] = own[kept].softmax(-1)
            assert inverse_cdf_sample(p.log()[None], torch.tensor(uniform[t : t + 1])).item() == token
            assert drawn.logp[i, t].item() == pytest.approx(p[token].log().item(), abs=1e-10)
    assert (drawn.candidates[~drawn.response_mask] == -1).all()


def test_greedy_and_truncated_is_the_policys_choice_among_the_references():
    policy, reference = random_model(dtype="float64", seed=1), random_model(dtype="float64")
    drawn = sample(SamplingLaw(11, None, top_k=1), reference=reference, greedy=True)
    own = sample(SamplingLaw(11, None), policy=reference, greedy=True)
    assert responses(drawn) == responses(own) != responses(sample(SamplingLaw(11, None), policy=policy, greedy=True))
    assert not drawn.logp.any(), "of one candidate the policy is sure"


def test_values_are_the_policys():
    policy, reference = random_model(dtype="float64", seed=1), random_model(dtype="float64")
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    drawn = sample(CUT, policy=policy, reference=reference)
    ids = torch.tensor([PROMPTS[0]])
    _, values = policy(ids, torch.ones_like(ids, dtype=torch.bool))
    assert drawn.values[0, 0].item() == pytest.approx(values[0, -1].item(), abs=1e-10)
