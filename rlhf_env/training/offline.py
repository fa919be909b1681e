"""Data written beforehand, read as the environment would have written them: comparisons, and logged responses."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.task import TextTask
from rlhf_env.errors import ConfigError, DataError, RLHFEnvError
from rlhf_env.functional import token_rewards
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.preferences.comparisons import load_comparisons
from rlhf_env.records.jsonl import require_keys
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.sources import read_rows
from rlhf_env.types import Pairs, Rollout

TooLong = Literal["error", "drop"]


def load_pairs(source: str, envs: Any, *, too_long: TooLong = "error") -> Pairs:
    """Every pair of different responses in a source of comparisons (`read_comparisons`), with the reference's ref_logp.

    A ranking of K responses gives K(K − 1)/2 pairs. Texts become the token ids of the environment's episodes: chat
    template, EOS where a response ends before the length limit. `DataError` names file and line of a response that
    the environment could not have written; with `too_long="drop"` those that are only too long are left out, with a
    warning that counts them. A response of the limit's length may be that when its text is read again, for other tokens
    may spell it.
    """
    task = find_cores(envs)[0].task
    if task.reference is None:
        raise ConfigError("preferences are learned relative to a reference, and this environment has none")
    reading = load_comparisons(source)
    comparisons = list(zip(reading.places, reading.comparisons, strict=True))
    texts = [(where, each.prompt, response) for where, each in comparisons for response in each.responses]
    kept, ids = _token_ids(task, texts, too_long)
    place = {number: row for row, number in enumerate(kept)}  # of a text's number, where it is left
    pairs, offset = [], 0
    for _, comparison in comparisons:
        pairs += [(offset + i, offset + j, preferred) for i, j, preferred in comparison.pairs]
        offset += len(comparison.responses)
    pairs = [(place[i], place[j], preferred) for i, j, preferred in pairs if i in place and j in place]
    if not pairs:
        raise DataError(f"{source}: no comparison has two responses that differ, so there is nothing to learn")
    responses = _episodes(task, [texts[number] for number in kept], ids)
    first, second, preference = zip(*pairs, strict=True)
    return Pairs(responses[list(first)], responses[list(second)], torch.tensor(preference))


def load_log(source: str, envs: Any, *, too_long: TooLong = "error") -> Rollout:
    """Logged responses as finished episodes: rows {"prompt", "response"} of a `.jsonl` file or `hf:NAME[:SPLIT]`.

    All rows have a "score", or none: then the environment's reward model says it. `reward` is score − penalties on the
    last token, without a KL term. Who wrote the responses is not known: `logp` is the reference's, like `ref_logp`,
    and values are 0. Texts become token ids as in `load_pairs`, and what is too long is treated likewise.
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
    kept, ids = _token_ids(task, texts, too_long)
    rows, texts = [rows[number] for number in kept], [texts[number] for number in kept]
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


def _token_ids(
    task: TextTask, texts: Sequence[tuple[str, str, str]], too_long: TooLong
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """The numbers of the (where, prompt, response) that are kept, and the token ids of prompt and response of each."""
    kept, ids = [], []
    for number, (where, prompt, response) in enumerate(texts):
        try:
            ids.append(_encode(task, prompt, response))
            kept.append(number)
        except _TooLongError as error:
            if too_long == "error":
                raise DataError(f"{where}: {error}") from error
        except RLHFEnvError as error:
            raise DataError(f"{where}: {error}") from error
    if texts and not kept:
        raise DataError(f"{texts[0][0]}: all responses are too long: raise max_new_tokens")
    if left_out := len(texts) - len(kept):
        warnings.warn(f"{left_out} of {len(texts)} responses are longer than the limit and left out", stacklevel=3)
    return kept, ids


class _TooLongError(DataError):
    """A response is longer than those of the environment."""


def _encode(task: TextTask, prompt: str, response: str) -> tuple[list[int], list[int]]:
    asked = list(task.encode_prompt(prompt))
    ids, longest = task.codec.encode_response(asked, prompt, response), task.longest(len(asked))
    stopped = bool(task.stop_strings) and task.says_stop(asked, ids)
    if task.law.eos_token_id is not None and len(ids) < longest and not stopped:
        ids = [*ids, task.law.eos_token_id]
    if len(ids) > longest:
        raise _TooLongError(
            f"a response of {len(ids)} tokens, where the environment's have at most {longest}: raise max_new_tokens, "
            "or leave out what is too long with too_long=drop"
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
