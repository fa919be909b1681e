"""One-line bugs of the kind that RLHF code really ships, and the tests that must notice each; see test_mutations.py."""

from __future__ import annotations

from dataclasses import dataclass

FUNCTIONAL = "tests/test_functional.py"
TYPES = "tests/test_types.py"
DECODING = "tests/models/test_decoding.py"
CAUSAL_LM = "tests/models/test_causal_lm.py"
MDP = "tests/envs/test_token_mdp.py"
BINDING = "tests/envs/test_binding.py"
VECTOR = "tests/envs/test_vector.py"
TRUNCATION = "tests/envs/test_truncation.py"
REWARDS = "tests/envs/test_rewards.py"
REFERENCE = "tests/envs/test_reference.py"
PROMPTS = "tests/envs/test_prompts.py"
BETA = "tests/envs/test_beta.py"
COLLECT = "tests/training/test_collect.py"
PPO = "tests/agents/test_ppo.py"
SB3 = "tests/agents/test_sb3.py"
SB3_ALGORITHMS = "tests/agents/test_sb3_algorithms.py"
SB3_BUFFER = "tests/agents/test_sb3_buffer.py"
SB3_POLICY = "tests/agents/test_sb3_policy.py"
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
RUN = "tests/training/test_run.py"
RESUME = "tests/training/test_resume.py"
INTERRUPTION = "tests/training/test_interruption.py"


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
        "rlhf_env/models/reading.py",
        "rollout.law.log_probs(logits[:, :-1]",
        "rollout.law.log_probs(rollout.law.temperature * logits[:, :-1]",
        f"{DECODING}::test_log_probs_and_values_equal_the_teacher_forced_pass",
    ),
    Mutation(
        "minimum length missing from the teacher-forced pass",
        "rlhf_env/models/reading.py",
        "expand(len(rollout), t)\n",
        "expand(len(rollout), t) + rollout.law.min_new_tokens\n",
        f"{PPO}::test_with_learning_rate_zero_the_policy_stays_itself_for_a_whole_run",
    ),
    Mutation(
        "minimum length missing from the environment's reference",
        "rlhf_env/envs/core.py",
        "decoder(self.num_slots, self.task.law, **extra)",
        "decoder(self.num_slots, __import__('dataclasses').replace(self.task.law, min_new_tokens=0), **extra)",
        f"{MDP}::test_policy_equal_to_reference_has_no_kl_under_any_law",
    ),
    Mutation(
        "temperature inherited from the model's generation config",
        "rlhf_env/models/causal_lm.py",
        "return output.logits if self._keeps_last",
        "return output.logits / (self.model.generation_config.temperature or 1.0) if self._keeps_last",
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
        "rlhf_env/models/reading.py",
        "log_probs(logits[:, :-1], positions)",
        "log_probs(logits[:, 1:], positions)",
        f"{DECODING}::test_log_probs_and_values_equal_the_teacher_forced_pass",
    ),
    Mutation(
        "value of the state after the token",
        "rlhf_env/models/reading.py",
        "restrict(log_probs, rollout.candidates), values[:, :-1]",
        "restrict(log_probs, rollout.candidates), values[:, 1:]",
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
        "rlhf_env/models/sampling.py",
        "torch.from_numpy(np.arange(width) < length[:, None])",
        "torch.from_numpy(np.arange(width) < (length - ended)[:, None])",
        f"{DECODING}::test_the_mask_is_true_up_to_and_including_eos",
    ),
    Mutation(
        "the first to finish end the batch",
        "rlhf_env/models/sampling.py",
        "if len(going) + len(refill) == 0:",
        "if len(going) + len(refill) == 0 or (waiting == total and done.any() and len(refill) == 0):",
        f"{DECODING}::test_refilled_rows_are_not_a_sample_of_the_short",
    ),
    Mutation(
        "a model that keeps a state is decoded with a cache of keys and values",
        "rlhf_env/models/decoding.py",
        'if getattr(model, "_is_stateful", False):',
        "if False:",
        f"{DECODING}::test_a_model_that_keeps_a_state_is_decoded_without_a_cache",
    ),
    # --- the environment
    Mutation(
        "the environment pays for KL",
        "rlhf_env/envs/core.py",
        "reward[going] = (-self.episode_beta * (logp - ref_logp))[going]",
        "reward[going] = (self.episode_beta * (logp - ref_logp))[going]",
        f"{MDP}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "KL charged per token and at the end",
        "rlhf_env/envs/core.py",
        'if task.kl_placement == "token" and ref_logp is not None:',
        "if ref_logp is not None:",
        f"{MDP}::test_rewards_sum_to_score_minus_beta_kl_minus_penalty",
    ),
    Mutation(
        "β changes within an episode",
        "rlhf_env/envs/core.py",
        "(-self.episode_beta * (logp - ref_logp))",
        "(-self.beta * (logp - ref_logp))",
        f"{MDP}::test_an_episode_is_charged_the_beta_it_began_with",
    ),
    Mutation(
        "a missing EOS is rewarded",
        "rlhf_env/envs/core.py",
        "score - self.process_score - penalty, 0.0",
        "score - self.process_score + penalty, 0.0",
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
        '"score": outcome + self',
        '"score": outcome[::-1] + self',
        f"{VECTOR}::test_the_batch_is_step_for_step_that_many_single_environments",
    ),
    Mutation(
        "a truncated response is scored",
        "rlhf_env/envs/core.py",
        "self._worth(finished[~cut[finished]], reasons)",
        "self._worth(finished, reasons)",
        f"{MDP}::test_truncation_is_neither_scored_nor_penalised",
    ),
    Mutation(
        "stale log-probabilities are charged again",
        "rlhf_env/envs/policy_logp.py",
        "pushed, self._pushed = self._pushed, None",
        "pushed = self._pushed",
        f"{BINDING}::test_a_push_is_consumed_once",
    ),
    Mutation(
        "log-probabilities of other actions are charged",
        "rlhf_env/envs/policy_logp.py",
        "stepping & (told != actions)",
        "stepping & (told > self.task.law.vocab_size)",
        f"{BINDING}::test_a_stale_push_names_the_environment",
    ),
    Mutation(
        "observations are the state itself",
        "rlhf_env/envs/core.py",
        "array.copy() if slots is None",
        "array if slots is None",
        f"{MDP}::test_returned_arrays_are_the_callers",
    ),
    Mutation(
        "the step that only resets is charged",
        "rlhf_env/envs/core.py",
        "reward[going] = (-self.episode_beta * (logp - ref_logp))[going]",
        "reward = -self.episode_beta * (logp - ref_logp)",
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
        "if not np.isfinite(ref_logp).all():\n            slot =",
        "if False:\n            slot =",
        f"{MDP}::test_a_broken_reference_stops_the_step",
    ),
    Mutation(
        "after a failed reward the episodes go on from half a step",
        "rlhf_env/envs/core.py",
        "        self.active[going] = False  #",
        "        #",
        f"{MDP}::test_after_a_broken_reward_nobody_goes_on_from_half_a_step",
    ),
    # --- top-k, top-p and candidates
    Mutation(
        "each model is cut by its own top-k",
        "rlhf_env/models/truncation.py",
        "self.law.candidates(self.reference.log_probs",
        "self.law.candidates(self.own.log_probs",
        f"{COLLECT}::test_collect_equals_stepping",
    ),
    Mutation(
        "the reference is not renormalised over what is left",
        "rlhf_env/envs/core.py",
        "        log_probs = restrict(log_probs, candidates)\n",
        "",
        f"{TRUNCATION}::test_a_policy_that_is_its_reference_has_no_kl",
    ),
    Mutation(
        "the policy's probabilities are not renormalised in the teacher-forced pass",
        "rlhf_env/models/reading.py",
        "return log_probs if rollout.candidates is None else",
        "return log_probs if True else",
        f"{TRUNCATION}::test_the_kl_of_every_token_is_that_of_an_offline_recomputation",
    ),
    Mutation(
        "the token that reaches top-p is left out",
        "rlhf_env/types.py",
        "probs.cumsum(-1) - probs < self.top_p",
        "probs.cumsum(-1) < self.top_p",
        TYPES,
    ),
    Mutation(
        "top-p is measured outside of top-k",
        "rlhf_env/types.py",
        "probs = ordered.softmax(-1)",
        "probs = ordered.exp()",
        TYPES,
    ),
    Mutation(
        "ties among candidates are left to chance",
        "rlhf_env/types.py",
        "kept = above | (equal & (equal.cumsum(-1) <= missing))",
        "kept = above | (equal & (equal.flip(-1).cumsum(-1).flip(-1) <= missing))",
        TYPES,
    ),
    Mutation(
        "forbidden tokens are candidates",
        "rlhf_env/types.py",
        "kept = ordered > -torch.inf",
        "kept = ordered < torch.inf",
        TYPES,
    ),
    Mutation(
        "the sum of the likelier ones ends top-k too early",
        "rlhf_env/types.py",
        "if self.top_p < 1:",
        "if True:",
        "tests/envs/test_truncation.py::test_top_k_alone_keeps_k_however_small_the_tail",
    ),
    Mutation(
        "what top-k leaves out may be written",
        "rlhf_env/envs/core.py",
        "            allowed &= named[:, :-1]\n",
        "",
        f"{TRUNCATION}::test_a_truncated_token_is_refused_and_the_state_stays",
    ),
    Mutation(
        "after the end there are still candidates",
        "rlhf_env/envs/core.py",
        "            self.candidates[over], self.candidate_logp[over] = -1, LOWEST\n",
        "            pass\n",
        f"{TRUNCATION}::test_after_the_end_there_are_no_candidates",
    ),
    # --- rewards, prompts and β of the environment
    Mutation(
        "token scores are paid twice",
        "rlhf_env/envs/core.py",
        "score - self.process_score - penalty, 0.0",
        "score - penalty, 0.0",
        f"{REWARDS}::test_token_scores_and_the_score_of_the_whole_add_up",
    ),
    Mutation(
        "half a character is scored as what it is not",
        "rlhf_env/text/codec.py",
        'return "" if text.endswith("\\ufffd") and not last else',
        "return",
        f"{REWARDS}::test_half_a_character_is_worth_the_same_as_it_comes_and_afterwards",
    ),
    Mutation(
        "a decoder that failed half-way is believed",
        "rlhf_env/envs/core.py",
        "self.active[:], self._decoder, self._ref_log_probs = False, None, None",
        "pass",
        "tests/envs/test_faults.py",
    ),
    Mutation(
        "a push outlives its episode",
        "rlhf_env/envs/core.py",
        "self.log_pi.forget()  # what was pushed belongs to the episodes before",
        "pass",
        "tests/envs/test_faults.py",
    ),
    Mutation(
        "a policy that was not known is taken to be sure",
        "rlhf_env/envs/core.py",
        "known = over & (self.told == self.written)",
        "known = over",
        "tests/envs/test_faults.py",
    ),
    Mutation(
        "groups are cut apart",
        "rlhf_env/training/collect.py",
        "if start % task.group_size or episodes % task.group_size:",
        "if False:",
        "tests/envs/test_prompts.py",
    ),
    Mutation(
        "the context's end costs nothing",
        "rlhf_env/envs/core.py",
        'reasons[s] not in ("length", "context")',
        'reasons[s] != "length"',
        f"{REWARDS}::test_penalties_by_hand",
    ),
    Mutation(
        "ids of another vocabulary are scored",
        "rlhf_env/envs/rewards.py",
        "if by_ids is not None and _shares(reward_model, codec):",
        "if by_ids is not None:",
        f"{REWARDS}::test_ids_are_scored_only_where_they_mean_the_same_text",
    ),
    Mutation(
        "a deferred KL that belongs to the tokens is not charged at all",
        "rlhf_env/envs/core.py",
        "            elif self.task.defers:\n                reward -= charge\n",
        "            elif self.task.defers:\n",
        f"{REFERENCE}::test_deferred_an_episode_is_worth_the_same",
    ),
    Mutation(
        "the deferred KL of one episode is charged to another",
        "rlhf_env/envs/core.py",
        "self.ref_logp[finished, : ref_logp.shape[1]] = ref_logp",
        "self.ref_logp[finished, : ref_logp.shape[1]] = ref_logp[::-1]",
        f"{REFERENCE}::test_deferred_an_episode_is_worth_the_same",
    ),
    Mutation(
        "seeding leaves the group of before",
        "rlhf_env/envs/vector.py",
        "                self._prompts[i].restart()\n",
        "",
        f"{PROMPTS}::test_seeding_within_a_group_begins_a_new_one_and_a_plain_reset_does_not",
    ),
    Mutation(
        "a run that resumes within a group begins a new one",
        "rlhf_env/envs/prompt_stream.py",
        'self.left = state["left"]',
        "self.left = 0",
        f"{PROMPTS}::test_an_interrupted_environment_is_asked_the_same",
    ),
    Mutation(
        "collected groups begin wherever the batch does",
        "rlhf_env/envs/task.py",
        "drawn[(start + i) // group_size - first]",
        "drawn[i // group_size]",
        f"{PROMPTS}::test_collected_rows_share_prompts_in_groups",
    ),
    Mutation(
        "a prompt changes its side when others come",
        "rlhf_env/text/prompts.py",
        'for text in texts:\n        digest = hashlib.sha256(f"{salt}\\0{text}"',
        'for i, text in enumerate(texts):\n        digest = hashlib.sha256(f"{salt}\\0{i}"',
        "tests/text/test_prompts.py",
    ),
    Mutation(
        "episodes that β has not heard of are lost with an interruption",
        "rlhf_env/envs/core.py",
        'self._finished_kl = [np.nan if kl is None else kl for kl in state["unheard_kl"]]',
        "pass",
        f"{BETA}::test_an_interrupted_environment_goes_on_with_the_same_betas",
    ),
    Mutation(
        "a schedule counts only what has a KL",
        "rlhf_env/envs/beta.py",
        "self.episodes += len(kl)",
        "self.episodes += int(np.isfinite(np.asarray(kl)).sum())",
        f"{BETA}::test_a_scheduled_beta_by_hand",
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
        "token_score.sum(1) - rollout.penalty",
        "token_score.sum(1) + rollout.penalty",
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
        "core.load_beta_state(beta)  #",
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
        "agents/sb3/buffer.py",
        "        first[0] = True  #",
        "        #",
        f"{SB3}::test_with_learning_rate_zero_ratios_stay_one",
    ),
    Mutation(
        "minibatches split episodes",
        "agents/sb3/buffer.py",
        "np.split(np.arange(first.size), np.flatnonzero(first.T.reshape(-1))[1:])",
        "np.split(np.arange(first.size), np.flatnonzero(first.reshape(-1))[1:])",
        f"{SB3_BUFFER}::test_minibatches_are_whole_episodes_and_each_transition_comes_once",
    ),
    Mutation(
        "the hook pushes the step before",
        "agents/sb3/attach.py",
        "        push_to(cores, output[2], output[0])",
        "        push_to(cores, getattr(module, 'late', output[2]), output[0])\n        module.late = output[2]",
        f"{SB3_ALGORITHMS}::test_trained_weights_are_bitwise_equal_through_hook_bind_and_push",
    ),
    Mutation(
        "the terminal observation is the next episode's first",
        "rlhf_env/envs/vector.py",
        "{name: values[row] for name, values in last.items()}",
        "{name: values[row] * (name != 'response_mask') for name, values in last.items()}",
        f"{SB3}::test_terminal_observations_and_truncation",
    ),
    Mutation(
        "Stable-Baselines3 samples without the law",
        "agents/sb3/policy.py",
        "self.law: SamplingLaw = law",
        "self.law: SamplingLaw = SamplingLaw(law.vocab_size, law.eos_token_id)",
        f"{SB3_POLICY}::test_the_law_is_there_without_attaching_and_after_loading",
    ),
    Mutation(
        "the policy does not know what top-k leaves out",
        "agents/sb3/policy.py",
        "if self.law.truncates:",
        "if False:",
        f"{SB3_POLICY}::test_what_top_k_leaves_out_is_never_predicted",
    ),
    Mutation(
        "contexts are remembered beyond a change of weights",
        "agents/sb3/contexts.py",
        "if weights != self._weights:",
        "if not self._weights:",
        f"{SB3_POLICY}::test_changed_weights_are_read_anew",
    ),
    Mutation(
        "a row that fell behind is appended to all the same",
        "agents/sb3/contexts.py",
        "            rows.goes_on = grown.copy()",
        "            #",
        f"{SB3_POLICY}::test_the_same_context_gives_the_same_bits_however_many_rows_went_on",
    ),
    Mutation(
        "the deferred charge stays at the end as well",
        "agents/sb3/buffer.py",
        "(self.lump - self.beta",
        "(-self.beta",
        f"{SB3_BUFFER}::test_a_deferred_reference_pays_what_a_cached_one_pays",
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
    # --- runs that are measured, interrupted and continued
    Mutation(
        "of the best of n draws the last of equals stays",
        "rlhf_env/training/evaluate.py",
        "own.score.cpu().reshape(-1, best_of).argmax(1)",
        "(best_of - 1 - own.score.cpu().reshape(-1, best_of).flip(1).argmax(1))",
        f"{EVALUATE}::test_the_best_of_n_draws_is_the_policys_response",
    ),
    Mutation(
        "what an agent makes of its policy is not measured",
        "rlhf_env/training/run.py",
        "        policy = agent.policy\n",
        "        policy = parts.policy\n",
        f"{RUN}::test_what_is_measured_is_the_agents_policy_and_what_is_trained_is_kept",
    ),
    Mutation(
        "the best evaluation is the one of the highest score, whatever its KL",
        "rlhf_env/training/run.py",
        'objective = row["eval_score"] - beta *',
        'objective = row["eval_score"] - 0 *',
        f"{RUN}::test_the_best_evaluation_by_score_less_kl_keeps_its_model",
    ),
    Mutation(
        "learning from data begins anew when it is resumed",
        "rlhf_env/training/run.py",
        "agent.fit(data, updates=updates, start=start)",
        "agent.fit(data, updates=None if updates is None else updates - start)",
        f"{RESUME}::test_a_resumed_run_is_the_one_that_was_not_interrupted[dpo]",
    ),
    Mutation(
        "an interrupted run forgets the update that it waited for",
        "rlhf_env/training/run.py",
        "            if saved != spent.updates:\n                _save(run, agent, parts, spent)\n            raise",
        "            raise",
        f"{RESUME}::test_a_resumed_run_is_the_one_that_was_not_interrupted[ppo]",
    ),
    Mutation(
        "a signal waits for as long as it takes",
        "rlhf_env/training/interruption.py",
        "signal.setitimer(signal.ITIMER_REAL, grace, _AGAIN)",
        "pass",
        f"{INTERRUPTION}::test_it_is_given_so_much_time_and_no_more_even_if_somebody_catches_everything",
    ),
    Mutation(
        "TensorBoard keeps what a resumed run forgets",
        "rlhf_env/records/dashboards.py",
        "purge_step=start + 1",
        "purge_step=None",
        "tests/records/test_dashboards.py::test_tensorboard_forgets_what_a_resumed_run_forgets",
    ),
    Mutation(
        "a step that is not finite is blamed on the first prompt",
        "rlhf_env/training/run.py",
        "prompt(int(named[1]))",
        "prompt(0)",
        "tests/training/test_non_finite.py::test_the_step_is_refused_and_its_sample_named",
    ),
]
