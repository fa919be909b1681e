"""Data written beforehand, read as the environment would have written them: comparisons, and logged responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.task import TextTask
from rlhf_env.errors import ConfigError, DataError, RLHFEnvError
from rlhf_env.functional import token_rewards
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.preferences.comparisons import read_comparisons
from rlhf_env.records.jsonl import require_keys
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.sources import read_rows
from rlhf_env.types import Pairs, Rollout


def load_pairs(source: str, envs: Any) -> Pairs:
    """Every pair of different responses in a source of comparisons (`read_comparisons`), with the reference's ref_logp.

    A ranking of K responses gives K(K − 1)/2 pairs. Texts become the token ids of the environment's episodes: chat
    template, EOS where a response ends before the length limit. `DataError` names file and line of a response that
    the environment could not have written.
    """
    task = find_cores(envs)[0].task
    if task.reference is None:
        raise ConfigError("preferences are learned relative to a reference, and this environment has none")
    places = [where for where, _ in read_rows(source)]
    texts, first, second, preference = [], [], [], []
    for where, comparison in zip(places, read_comparisons(source), strict=True):
        for i, j, preferred in comparison.pairs:
            first.append(len(texts) + i)
            second.append(len(texts) + j)
            preference.append(preferred)
        texts += [(where, comparison.prompt, response) for response in comparison.responses]
    if not preference:
        raise DataError(f"{source}: no comparison has two responses that differ, so there is nothing to learn")
    responses = _episodes(task, texts, _token_ids(task, texts))
    return Pairs(responses[first], responses[second], torch.tensor(preference))


def load_log(source: str, envs: Any) -> Rollout:
    """Logged responses as finished episodes: rows {"prompt", "response"} of a `.jsonl` file or `hf:NAME[:SPLIT]`.

    All rows have a "score", or none: then the environment's reward model says it. `reward` is score − penalties on the
    last token, without a KL term. Who wrote the responses is not known: `logp` is the reference's, like `ref_logp`,
    and values are 0. Texts become token ids as in `load_pairs`.
    """
    core = find_cores(envs)[0]
    task, rows = core.task, read_rows(source, required={"prompt": str, "response": str})
    texts = [(where, row["prompt"], row["response"]) for where, row in rows]
    scored = ["score" in row for _, row in rows]
    if any(scored) and not all(scored):
        odd = scored.index(not scored[0])
        raise DataError(
            f"{rows[odd][0]}: this row has {'a' if scored[odd] else 'no'} 'score' and {rows[0][0]} has "
            f"{'one' if scored[0] else 'none'}: give every response its score, or none for the reward model's"
        )
    ids = _token_ids(task, texts)
    rollout = _episodes(task, texts, ids)
    token_score = torch.zeros_like(rollout.ref_logp)
    if scored[0]:
        for where, row in rows:
            require_keys(row, {"score": float}, where)
        score = np.array([row["score"] for _, row in rows], dtype=np.float64)
    else:
        told = [prompt for _, prompt, _ in texts], [prompt for prompt, _ in ids], [response for _, response in ids]
        score, _ = task.score(*told)
        for row, numbers in enumerate(task.token_scores(*told) if task.scores_tokens else []):
            token_score[row, : len(numbers)] = torch.from_numpy(numbers)
    penalties = task.penalties(rollout.ended.numpy(), rollout.lengths.numpy())
    penalty = torch.from_numpy(sum(penalties.values(), np.zeros(len(rows)))).to(token_score)
    worth = torch.from_numpy(score).to(token_score)
    last = token_rewards(worth - penalty, rollout.ref_logp, rollout.ref_logp, rollout.response_mask, 0.0)
    return dataclasses.replace(
        rollout,
        logp=rollout.ref_logp,
        score=worth + token_score.sum(1),
        penalty=penalty,
        reward=last + token_score,
        beta=torch.full_like(worth, core.beta),
    )


def _token_ids(task: TextTask, texts: Sequence[tuple[str, str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of the prompt and of the response of each (where, prompt, response)."""
    ids = []
    for where, prompt, response in texts:
        try:
            ids.append(_encode(task, prompt, response))
        except RLHFEnvError as error:
            raise DataError(f"{where}: {error}") from error
    return ids


def _encode(task: TextTask, prompt: str, response: str) -> tuple[list[int], list[int]]:
    asked = list(task.encode_prompt(prompt))
    ids, longest = task.codec.encode_response(asked, prompt, response), task.longest(len(asked))
    stopped = bool(task.stop_strings) and task.says_stop(asked, ids)
    if task.law.eos_token_id is not None and len(ids) < longest and not stopped:
        ids = [*ids, task.law.eos_token_id]
    if len(ids) > longest:
        raise DataError(
            f"a response of {len(ids)} tokens, where the environment's have at most {longest}: raise max_new_tokens, "
            "or take the row out"
        )
    if any(task.stop_reason(asked, ids[: n + 1]) is not None for n in range(len(ids) - 1)):
        raise DataError("the environment would have ended this response earlier, at EOS or one of its stop_strings")
    if not ids or task.stop_reason(asked, ids) is None:
        raise DataError(
            f"a response of {len(ids)} tokens, after which the environment, having no EOS, goes on until there are "
            f"{longest}"
        )
    return asked, ids


def _episodes(
    task: TextTask, texts: Sequence[tuple[str, str, str]], ids: Sequence[tuple[list[int], list[int]]]
) -> Rollout:
    """The responses as finished episodes, with the reference's log-probabilities if there is a reference."""
    if task.law.truncates:
        raise ConfigError(
            "which tokens top_k and top_p left to the writer of data is not known: to learn from data, leave both out"
        )
    rollout = Rollout.of_tokens([prompt for prompt, _ in ids], [response for _, response in ids], task.law)
    ended = torch.tensor([task.stop_reason(*both) in ("eos", "stop_string") for both in ids])
    rollout = dataclasses.replace(rollout, ended=ended)
    if task.reference is None:
        return rollout
    ref_logp = teacher_forced_logp(task.reference, rollout, chunk=16)
    if not (finite := torch.isfinite(ref_logp).all(1)).all():
        where, _, response = texts[int((~finite).nonzero()[0])]
        raise DataError(
            f'{where}: the reference could not have written "{safe_text(response[:60])}" under the environment\'s law '
            "(banned_tokens, min_new_tokens)"
        )
    return dataclasses.replace(rollout, ref_logp=ref_logp)
