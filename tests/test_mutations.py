"""Bugs that RLHF code really ships, put in one at a time: the tests must fail for each.

A mutation that survives is a missing test. Every row edits one place of a copy of the package and runs the narrowest
tests that should notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

FUNCTIONAL = "tests/test_functional.py"
TYPES = "tests/test_types.py"
DECODING = "tests/models/test_decoding.py"
CAUSAL_LM = "tests/models/test_causal_lm.py"
MDP = "tests/envs/test_token_mdp.py"
BINDING = "tests/envs/test_binding.py"
VECTOR = "tests/envs/test_vector.py"
COLLECT = "tests/training/test_collect.py"
PPO = "tests/agents/test_ppo.py"
SB3 = "tests/agents/test_sb3.py"
CLASSIFIER = "tests/reward_models/test_classifier.py"
EVALUATE = "tests/training/test_evaluate.py"
BRADLEY_TERRY = "tests/reward_models/test_bradley_terry.py"
SFT = "tests/models/test_sft.py"
RUN_SFT = "tests/training/test_sft.py"
LABELERS = "tests/preferences/test_labelers.py"
COMPARISONS = "tests/preferences/test_comparisons.py"
PREFER = "tests/training/test_prefer.py"
PIPELINE = "tests/training/test_pipeline.py"
PAGE = "tests/report/test_page.py"


@dataclass(frozen=True)
class Mutation:
    """A bug, where it goes, and who should see it."""

    bug: str
    file: str
    old: str
    new: str
    caught_by: str


MUTATIONS = [
    # --- the mathematics
    Mutation(
        "whitening keeps the mean",
        "rlhf_env/functional.py",
        "centred = x - masked_mean(x, mask)",
        "centred = x",
        FUNCTIONAL,
    ),
    Mutation(
        "short rows weigh as much as long ones",
        "rlhf_env/functional.py",
        "masked_sum(x, mask) / mask.sum().clamp(min=1)",
        "(masked_sum(x, mask, 1) / mask.sum(1).clamp(min=1)).mean()",
        FUNCTIONAL,
    ),
    Mutation(
        "the KL is a bonus",
        "rlhf_env/functional.py",
        "return -beta.reshape(-1, 1) * kl",
        "return beta.reshape(-1, 1) * kl",
        FUNCTIONAL,
    ),
    Mutation(
        "the score lands on the token after the last",
        "rlhf_env/functional.py",
        "return mask & ~following",
        "return ~mask & torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)",
        FUNCTIONAL,
    ),
    Mutation(
        "GAE without λ",
        "rlhf_env/functional.py",
        "delta + gamma * lam * next_advantage",
        "delta + gamma * next_advantage",
        FUNCTIONAL,
    ),
    Mutation(
        "GAE bootstraps from the padding",
        "rlhf_env/functional.py",
        "rewards, values = torch.where(mask, rewards, zero), torch.where(mask, values, zero)",
        "rewards = torch.where(mask, rewards, zero)",
        FUNCTIONAL,
    ),
    Mutation(
        "max instead of min in the surrogate",
        "rlhf_env/functional.py",
        "surrogate = torch.minimum(",
        "surrogate = torch.maximum(",
        FUNCTIONAL,
    ),
    Mutation(
        "padding reaches the ratio",
        "rlhf_env/functional.py",
        "torch.where(mask, logp - old_logp, zero).exp()",
        "(logp - old_logp).exp()",
        FUNCTIONAL,
    ),
    Mutation(
        "the better of clipped and unclipped value error",
        "rlhf_env/functional.py",
        "torch.maximum((values - returns)",
        "torch.minimum((values - returns)",
        FUNCTIONAL,
    ),
    Mutation(
        "adaptive β runs away from its target",
        "rlhf_env/functional.py",
        "kl / target - 1.0",
        "1.0 - kl / target",
        FUNCTIONAL,
    ),
    Mutation(
        "a batch beyond the horizon turns β negative",
        "rlhf_env/functional.py",
        "min(episodes / horizon, 1.0)",
        "episodes / horizon",
        FUNCTIONAL,
    ),
    # --- the sampling law
    Mutation(
        "temperature missing from the log-probabilities",
        "rlhf_env/types.py",
        "logits = logits / self.temperature",
        "logits = logits * 1.0",
        TYPES,
    ),
    Mutation(
        "temperature missing from the teacher-forced pass",
        "rlhf_env/models/causal_lm.py",
        "rollout.law.log_probs(logits[:, :-1]",
        "rollout.law.log_probs(rollout.law.temperature * logits[:, :-1]",
        f"{DECODING}::test_log_probs_and_values_equal_the_teacher_forced_pass",
    ),
    Mutation(
        "minimum length missing from the teacher-forced pass",
        "rlhf_env/models/causal_lm.py",
        "expand(len(rollout), t)\n",
        "expand(len(rollout), t) + rollout.law.min_new_tokens\n",
        f"{PPO}::test_with_learning_rate_zero_the_policy_stays_itself_for_a_whole_run",
    ),
    Mutation(
        "minimum length missing from the environment's reference",
        "rlhf_env/envs/core.py",
        "decoder(self.num_slots, self.task.law)",
        "decoder(self.num_slots, __import__('dataclasses').replace(self.task.law, min_new_tokens=0))",
        f"{MDP}::test_policy_equal_to_reference_has_no_kl_under_any_law",
    ),
    Mutation(
        "temperature inherited from the model's generation config",
        "rlhf_env/models/causal_lm.py",
        "return output.logits[:, -keep:], values",
        "return output.logits[:, -keep:] / (self.model.generation_config.temperature or 1.0), values",
        f"{CAUSAL_LM}::test_poisoned_generation_config_changes_nothing",
    ),
    Mutation(
        "log-probabilities in bfloat16",
        "rlhf_env/types.py",
        "logits = logits.float()",
        "pass",
        TYPES,
    ),
    # --- the language model
    Mutation(
        "no position ids under left padding",
        "rlhf_env/models/causal_lm.py",
        "position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
        "position_ids = torch.arange(attention_mask.shape[1], device=input_ids.device)[None]",
        f"{CAUSAL_LM}::test_observations_of_the_environment_give_the_same_log_probs",
    ),
    Mutation(
        "logits off by one",
        "rlhf_env/models/causal_lm.py",
        "log_probs(logits[:, :-1], positions)",
        "log_probs(logits[:, 1:], positions)",
        f"{DECODING}::test_log_probs_and_values_equal_the_teacher_forced_pass",
    ),
    Mutation(
        "value of the state after the token",
        "rlhf_env/models/causal_lm.py",
        "positions), values[:, :-1]",
        "positions), values[:, 1:]",
        f"{DECODING}::test_log_probs_and_values_equal_the_teacher_forced_pass",
    ),
    Mutation(
        "dropout while training",
        "rlhf_env/models/causal_lm.py",
        "return super().train(False)",
        "return super().train(mode)",
        f"{CAUSAL_LM}::test_dropout_never_turns_on",
    ),
    Mutation(
        "the reference is the policy",
        "rlhf_env/models/causal_lm.py",
        "copy.deepcopy(self).requires_grad_(False)",
        "self.requires_grad_(False)",
        f"{CAUSAL_LM}::test_frozen_copy_shares_nothing_and_learns_nothing",
    ),
    # --- decoding
    Mutation(
        "cached positions count padding",
        "rlhf_env/models/decoding.py",
        "positions = self.mask.sum(1, keepdim=True) - 1",
        "positions = torch.full((n, 1), self.mask.shape[1] - 1)",
        f"{DECODING}::test_cached_equals_uncached_through_refills",
    ),
    Mutation(
        "a refilled row still sees the episode before",
        "rlhf_env/models/decoding.py",
        "self.mask[index] = pad(mask,",
        "self.mask[index] |= pad(mask,",
        f"{DECODING}::test_cached_equals_uncached_through_refills",
    ),
    Mutation(
        "the cache is trimmed by one column too many",
        "rlhf_env/models/decoding.py",
        "        if first:\n",
        "        if first and (first := first + 1):\n",
        f"{DECODING}::test_cached_equals_uncached_through_refills",
    ),
    Mutation(
        "an idle row outgrows the context",
        "rlhf_env/models/decoding.py",
        "        self.mask[idle] = False",
        "        pass",
        f"{DECODING}::test_no_row_ever_stands_beyond_the_context",
    ),
    Mutation(
        "EOS excluded from the mask",
        "rlhf_env/models/decoding.py",
        "torch.from_numpy(np.arange(width) < length[:, None])",
        "torch.from_numpy(np.arange(width) < (length - ended)[:, None])",
        f"{DECODING}::test_the_mask_is_true_up_to_and_including_eos",
    ),
    Mutation(
        "the first to finish end the batch",
        "rlhf_env/models/decoding.py",
        "if len(going) + len(refill) == 0:",
        "if len(going) + len(refill) == 0 or (waiting == total and done.any() and len(refill) == 0):",
        f"{DECODING}::test_refilled_rows_are_not_a_sample_of_the_short",
    ),
    Mutation(
        "a model without a cache is read without its past",
        "rlhf_env/models/decoding.py",
        "if not cache.layers or not all(",
        "if not all(",
        f"{DECODING}::test_a_model_without_keys_and_values_is_refused_and_not_read_without_its_past",
    ),
    # --- the environment
    Mutation(
        "the environment pays for KL",
        "rlhf_env/envs/core.py",
        "reward[going] -= (self.episode_beta * kl_token)[going]",
        "reward[going] += (self.episode_beta * kl_token)[going]",
        f"{MDP}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "KL charged per token and at the end",
        "rlhf_env/envs/core.py",
        'if task.kl_placement == "token":',
        "if True:",
        f"{MDP}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "β changes within an episode",
        "rlhf_env/envs/core.py",
        "(self.episode_beta * kl_token)",
        "(self.beta * kl_token)",
        f"{MDP}::test_an_episode_is_charged_the_beta_it_began_with",
    ),
    Mutation(
        "a missing EOS is rewarded",
        "rlhf_env/envs/core.py",
        "-float(penalty[i])",
        "float(penalty[i])",
        f"{MDP}::test_where_episodes_end_and_what_it_costs",
    ),
    Mutation(
        "an EOS on the last token counts as missing",
        "rlhf_env/envs/task.py",
        "if response[-1] == self.law.eos_token_id:",
        "if response[-1] == self.law.eos_token_id and len(response) < self.max_new_tokens:",
        f"{MDP}::test_where_episodes_end_and_what_it_costs",
    ),
    Mutation(
        "scores go to the wrong environment",
        "rlhf_env/envs/core.py",
        "s: (float(score[i]),",
        "s: (float(score[-1 - i]),",
        f"{VECTOR}::test_the_batch_is_step_for_step_that_many_single_environments",
    ),
    Mutation(
        "a truncated response is scored",
        "rlhf_env/envs/core.py",
        "scored = [slot for slot in finished if not cut[slot]]",
        "scored = finished",
        f"{MDP}::test_truncation_is_neither_scored_nor_penalised",
    ),
    Mutation(
        "stale log-probabilities are charged again",
        "rlhf_env/envs/core.py",
        "pushed, self._pushed = self._pushed, None",
        "pushed = self._pushed",
        f"{BINDING}::test_a_push_is_consumed_once",
    ),
    Mutation(
        "log-probabilities of other actions are charged",
        "rlhf_env/envs/core.py",
        "stepping & (told != actions)",
        "stepping & (told > self.task.law.vocab_size)",
        f"{BINDING}::test_a_stale_push_names_the_environment",
    ),
    Mutation(
        "observations are the state itself",
        "rlhf_env/envs/core.py",
        "self.input_ids.copy()",
        "self.input_ids",
        f"{MDP}::test_returned_arrays_are_the_callers",
    ),
    Mutation(
        "the step that only resets is charged",
        "rlhf_env/envs/core.py",
        "reward[going] -= (self.episode_beta * kl_token)[going]",
        "reward -= self.episode_beta * kl_token",
        f"{BINDING}::test_a_row_that_is_only_reset_ignores_its_push",
    ),
    Mutation(
        "a reset by hand is followed by another",
        "rlhf_env/envs/vector.py",
        "        self._over[mask] = False\n",
        "",
        f"{VECTOR}::test_a_reset_by_hand_leaves_no_reset_for_the_next_step",
    ),
    Mutation(
        "NaN of the reference is paid out",
        "rlhf_env/envs/core.py",
        "if not np.isfinite(ref_logp).all():",
        "if False:",
        f"{MDP}::test_a_broken_reference_stops_the_step",
    ),
    Mutation(
        "after a failed reward the episodes go on from half a step",
        "rlhf_env/envs/core.py",
        "        self.active[going] = False  #",
        "        #",
        f"{MDP}::test_after_a_broken_reward_nobody_goes_on_from_half_a_step",
    ),
    # --- collecting
    Mutation(
        "rewards of other rows",
        "rlhf_env/training/collect.py",
        "task.score(prompts, prompt_ids, responses)",
        "task.score(prompts, prompt_ids, responses)[::-1].copy()",
        f"{COLLECT}::test_collect_equals_stepping",
    ),
    Mutation(
        "what looks like padding is masked",
        "rlhf_env/training/collect.py",
        "response_mask=samples.response_mask,",
        "response_mask=samples.response_mask & (samples.response_ids != task.codec.pad_token_id),",
        f"{PPO}::test_eos_is_learned_where_pad_is_eos",
    ),
    Mutation(
        "the same random numbers every update",
        "rlhf_env/training/collect.py",
        "(seed, start + i, _SAMPLING_STREAM)",
        "(seed, i, _SAMPLING_STREAM)",
        f"{COLLECT}::test_episodes_do_not_depend_on_how_many_are_collected_at_once",
    ),
    Mutation(
        "the penalty is added",
        "rlhf_env/training/collect.py",
        "rollout.score - rollout.penalty",
        "rollout.score + rollout.penalty",
        f"{COLLECT}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "KL to oneself",
        "rlhf_env/training/collect.py",
        "teacher_forced_logp(task.reference, rollout)",
        "teacher_forced_logp(policy, rollout)",
        f"{COLLECT}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "evaluation moves β",
        "rlhf_env/training/evaluate.py",
        "core.beta = beta  #",
        "pass  #",
        f"{EVALUATE}::test_evaluation_leaves_an_adaptive_beta_alone",
    ),
    # --- the training loop
    Mutation(
        "the same prompts every update",
        "rlhf_env/training/loop.py",
        "start=spent.episodes)",
        "start=0)",
        "tests/training/test_loop.py",
    ),
    # --- PPO
    Mutation(
        "old log-probabilities are recomputed, the ratio is 1",
        "agents/ppo.py",
        "ppo_clip_loss(logp, batch.logp,",
        "ppo_clip_loss(logp, logp.detach(),",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "advantages of other episodes",
        "agents/ppo.py",
        "advantages[rows], m, c.clip)",
        "advantages[: len(rows)], m, c.clip)",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "returns of other episodes",
        "agents/ppo.py",
        "returns[rows], m, c.value_clip)",
        "returns[: len(rows)], m, c.value_clip)",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "values learn whitened returns",
        "agents/ppo.py",
        "returns = advantages + rollout.values",
        "returns = whiten(advantages, mask) + rollout.values",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "the entropy bonus is a fine",
        "agents/ppo.py",
        "- c.entropy_coef * entropy_mean",
        "+ c.entropy_coef * entropy_mean",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "gradients pile up",
        "agents/ppo.py",
        "self.optimizer.zero_grad(set_to_none=True)",
        "pass",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "gradients are measured and not clipped",
        "agents/ppo.py",
        "clip_grad_norm_(self.parameters, self.config.max_grad_norm)",
        "clip_grad_norm_(self.parameters, torch.inf)",
        f"{PPO}::test_an_update_is_the_paper_written_out",
    ),
    Mutation(
        "NaN in a rollout is learned from",
        "agents/ppo.py",
        "rollout.require_finite().response_mask",
        "rollout.response_mask",
        f"{PPO}::test_a_non_finite_step_is_refused_and_touches_no_weight",
    ),
    Mutation(
        "NaN in a gradient is stepped along",
        "agents/ppo.py",
        "if not (torch.isfinite(loss) and torch.isfinite(norm)):",
        "if False:",
        f"{PPO}::test_broken_weights_name_the_episode",
    ),
    # --- Stable-Baselines3
    Mutation(
        "episodes of two environments are joined",
        "agents/sb3.py",
        "        first[0] = True  #",
        "        #",
        f"{SB3}::test_with_learning_rate_zero_ratios_stay_one",
    ),
    Mutation(
        "minibatches split episodes",
        "agents/sb3.py",
        "np.split(np.arange(total), np.flatnonzero(first.T.reshape(-1))[1:])",
        "np.split(np.arange(total), np.flatnonzero(first.reshape(-1))[1:])",
        f"{SB3}::test_minibatches_are_whole_episodes_and_each_transition_comes_once",
    ),
    Mutation(
        "the hook pushes the step before",
        "agents/sb3.py",
        "        push_to(cores, output[2], output[0])",
        "        push_to(cores, getattr(module, 'late', output[2]), output[0])\n        module.late = output[2]",
        f"{SB3}::test_trained_weights_are_bitwise_equal_through_hook_bind_and_push",
    ),
    Mutation(
        "the terminal observation is the next episode's first",
        "rlhf_env/envs/vector.py",
        "{k: v[i].copy() for k, v in final_observation.items()}",
        "{k: v[i] * (k != 'response_mask') for k, v in final_observation.items()}",
        f"{SB3}::test_terminal_observations_and_truncation",
    ),
    Mutation(
        "Stable-Baselines3 samples without the law",
        "agents/sb3.py",
        "model.policy.law = cores[0].task.law",
        "pass",
        f"{SB3}::test_the_sampling_law_is_the_environments",
    ),
    # --- reward models
    Mutation(
        "padding is attended to",
        "reward_models/classifier.py",
        "mask = torch.zeros(len(rows), width",
        "mask = torch.ones(len(rows), width",
        CLASSIFIER,
    ),
    Mutation(
        "scores in order of length",
        "reward_models/classifier.py",
        "known |= zip(batch,",
        "known |= zip(list(dict.fromkeys(rows))[start : start + len(batch)],",
        CLASSIFIER,
    ),
    Mutation(
        "padding is what the last token of a text is read from",
        "reward_models/classifier.py",
        "self._pad: int | None = config.pad_token_id\n",
        "self._pad: int | None = config.pad_token_id\n        config.pad_token_id = 0\n",
        CLASSIFIER,
    ),
    Mutation(
        "the normaliser is forgotten when a reward model is loaded",
        "reward_models/classifier.py",
        'return getattr(self.model.config, "reward_std", 1.0)',
        "return getattr(self, '_std', 1.0)",
        CLASSIFIER,
    ),
    Mutation(
        "the normaliser is not saved",
        "reward_models/classifier.py",
        "        self.model.save_pretrained(folder)\n",
        "        self.model.config.update({'reward_mean': 0.0, 'reward_std': 1.0})\n"
        "        self.model.save_pretrained(folder)\n",
        CLASSIFIER,
    ),
    Mutation(
        "the head of a reward model is left to chance",
        "reward_models/bradley_terry.py",
        "    _draw(seed, {",
        "    dict({",
        f"{BRADLEY_TERRY}::test_the_head_comes_from_the_seed_alone_and_disturbs_nobodys_random_numbers",
    ),
    Mutation(
        "what is rejected is preferred",
        "reward_models/bradley_terry.py",
        "return logits[first] - logits[second],",
        "return logits[second] - logits[first],",
        BRADLEY_TERRY,
    ),
    # --- fine-tuning
    Mutation(
        "EOS is not learned",
        "rlhf_env/models/sft.py",
        "return EncodedDemonstration((*ids, eos), learned_from)",
        "return EncodedDemonstration(tuple(ids), learned_from)",
        SFT,
    ),
    Mutation(
        "the prompt is learned",
        "rlhf_env/models/sft.py",
        "codec.encode_response(before, prompt, response), len(before)",
        "codec.encode_response(before, prompt, response), 1",
        SFT,
    ),
    Mutation(
        "demonstrations are measured on that were learned from",
        "rlhf_env/training/sft.py",
        "return learned, held_out,",
        "return rows, held_out,",
        RUN_SFT,
    ),
    # --- comparisons
    Mutation(
        "labels are upside down",
        "rlhf_env/preferences/labelers.py",
        "np.unique(noisy if flipped else -noisy,",
        "np.unique(-noisy if flipped else noisy,",
        LABELERS,
    ),
    Mutation(
        "nobody errs by a flip",
        "rlhf_env/preferences/labelers.py",
        "np.unique(noisy if flipped else -noisy,",
        "np.unique(-noisy,",
        LABELERS,
    ),
    Mutation(
        "the noise of a labeler has no scale",
        "rlhf_env/preferences/labelers.py",
        "self.config.temperature * rng.gumbel(",
        "bool(self.config.temperature) * rng.gumbel(",
        LABELERS,
    ),
    Mutation(
        "ranks are of the order of presentation",
        "rlhf_env/training/prefer.py",
        "answer[order.index(i)]",
        "answer[i]",
        PREFER,
    ),
    Mutation(
        "prompts are on both sides of the split",
        "rlhf_env/preferences/comparisons.py",
        "groups = list(by_prompt.values()) if len(by_prompt) > 1 else",
        "groups =",
        COMPARISONS,
    ),
    Mutation(
        "chosen and rejected are mixed up",
        "rlhf_env/preferences/comparisons.py",
        "return Comparison(prompt, (chosen, rejected), (0, 1))",
        "return Comparison(prompt, (rejected, chosen), (0, 1))",
        COMPARISONS,
    ),
    # --- the pipeline
    Mutation(
        "prompts to evaluate on are compared and trained on",
        "rlhf_env/training/pipeline.py",
        'for name, texts in (("train", prompts),',
        'for name, texts in (("train", [*prompts, *eval_prompts]),',
        f"{PIPELINE}::test_prompts_to_evaluate_on_are_met_in_no_stage_before",
    ),
    Mutation(
        "the pipeline evaluates on prompts that it trained on",
        "rlhf_env/training/pipeline.py",
        '"reference": reference, "prompts": eval_prompts}',
        '"reference": reference, "prompts": train_prompts}',
        f"{PIPELINE}::test_each_stage_gets_what_the_one_before_it_left",
    ),
    Mutation(
        "the policy is evaluated as it was before training",
        "rlhf_env/training/pipeline.py",
        '{"policy": str(out / "train" / "model"), "reference"',
        '{"policy": reference, "reference"',
        f"{PIPELINE}::test_each_stage_gets_what_the_one_before_it_left",
    ),
    Mutation(
        "a stage that was interrupted counts as done",
        "rlhf_env/training/pipeline.py",
        "        if not Run(folder).finished:\n",
        "        if not folder.exists():\n",
        f"{PIPELINE}::test_interrupted_in_every_stage_it_becomes_the_pipeline_that_was_not",
    ),
    Mutation(
        "a pipeline is continued with other settings than it was begun with",
        "rlhf_env/training/pipeline.py",
        "        _require_same(out, stages, files)\n",
        "        pass\n",
        f"{PIPELINE}::test_what_a_stage_was_done_with_cannot_change",
    ),
    Mutation(
        "the mean over seeds has no interval",
        "rlhf_env/cli/pipeline.py",
        'interval(mean, "mean") for mean',
        'interval(mean, "gold") if "gold" in mean else decimal(mean["mean"]) for mean',
        "tests/cli/test_pipeline.py::test_a_table_of_seeds_has_means_with_students_t",
    ),
    # --- what is measured and shown
    Mutation(
        "best of n is chosen by gold",
        "rlhf_env/training/evaluate.py",
        "best_of_n(scores, n, gold)",
        "best_of_n(gold, n)",
        f"{EVALUATE}::test_best_of_n_path_by_brute_force",
    ),
    Mutation(
        "tokens are shown without their KL",
        "rlhf_env/training/evaluate.py",
        "    kl = rollout.logp - rollout.ref_logp\n",
        "    kl = torch.zeros_like(rollout.logp)\n",
        EVALUATE,
    ),
    Mutation(
        "the page believes a prompt to be HTML",
        "rlhf_env/report/samples.py",
        "{safe_html(sample.prompt)}",
        "{sample.prompt}",
        f"{PAGE}::test_hostile_text_stays_text_in_every_field",
    ),
]


def copy_package(folder: Path) -> None:
    for name in ("rlhf_env", "agents", "reward_models", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--hypothesis-seed=0", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_bug_they_all_pass(tmp_path: Path) -> None:
    copy_package(tmp_path)
    code = "import rlhf_env.agents.ppo as ppo, rlhf_env.types as types; print(types.__file__, ppo.__file__, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert all(Path(line).is_relative_to(tmp_path) for line in imported.split()), "the copy is what is tested"
    result = run_tests(tmp_path, *dict.fromkeys(m.caught_by for m in MUTATIONS))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.bug)
def test_the_bug_is_caught(tmp_path: Path, mutation: Mutation) -> None:
    copy_package(tmp_path)
    file = tmp_path / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, "the place to edit is gone or no longer unique: bring this table up to date"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    result = run_tests(tmp_path, mutation.caught_by)
    # 1: tests ran and some failed; a mutation that breaks the import or the collection is no proof (2).
    assert result.returncode == 1, f"exit code {result.returncode} (0: the bug survived):\n{result.stdout[-3000:]}"
