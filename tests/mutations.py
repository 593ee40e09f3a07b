"""Faults that the suite has to catch: each is put into a copy of the package, and the test that is named has to fail.

    python tests/mutations.py            # all, ten minutes or so on two cores
    python tests/mutations.py block kl   # those whose name contains one of the words

Run it after a change of the tests: a quicker suite must still prove as much. `tests/README.md` has the table, which
this script writes with `--table`.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault: `old`, which stands once in the file, becomes `new`, and `test` has to notice."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    # Layers in one product.
    Mutation(
        "groups of queries, keys and values are not by key/value head",
        "models/_fused.py",
        "num_kv_heads * head_dim), num_kv_heads)",
        "num_kv_heads * head_dim), 1)",
        "test_fused.py::test_half_of_the_groups_is_a_layer_of_half_the_size",
    ),
    Mutation(
        "gates and ups lie in halves",
        "models/_fused.py",
        "intermediate_size // math.gcd(intermediate_size, _GATES_OF_A_GROUP)",
        "1",
        "test_fused.py::test_half_of_the_groups_is_a_layer_of_half_the_size",
    ),
    Mutation(
        "drafts of the first format are read as they are",
        "drafts/_save.py",
        'draft if about["format"] > 1 else',
        'draft if about["format"] > 0 else',
        "test_fused.py::test_a_draft_of_the_first_format",
    ),
    # The law of what is decoded.
    Mutation(
        "rejection keeps too often",
        "decoding/_rejection.py",
        "jnp.exp(jnp.cumsum(jnp.minimum(log_ratio, 0.0)))",
        "jnp.exp(0.9 * jnp.cumsum(jnp.minimum(log_ratio, 0.0)))",
        "test_exactness.py::test_our_rules_keep_the_law[Rejection]",
    ),
    Mutation(
        "a rejected token is replaced by a draw from the target, not the residual",
        "decoding/_rejection.py",
        "residual = jnp.maximum(target_probs - proposal.probs_at(num_accepted, target_probs.shape[-1]), 0.0)",
        "residual = target_probs",
        "test_exactness.py::test_our_rules_keep_the_law[Rejection]",
    ),
    Mutation(
        "block verification forgets the chain in the residual",
        "decoding/_block.py",
        "jnp.maximum(chain[num_accepted] * target_probs - draft_probs, 0.0)",
        "jnp.maximum(target_probs - draft_probs, 0.0)",
        "test_exactness.py::test_our_rules_keep_the_law[Block]",
    ),
    Mutation(
        "block verification forgets what the draft cannot say",
        "decoding/_block.py",
        "jnp.maximum(kept - jnp.sum(common), 0.0)",
        "jnp.maximum(jnp.sum(kept * target_probs - common), 0.0)",
        "test_exactness.py::test_sums_over_the_drafts_tokens_are_those_over_the_vocabulary",
    ),
    Mutation(
        "block verification keeps up to the first position that passes, not the last",
        "decoding/_block.py",
        "none_from = lax.cumprod(1.0 - passes, reverse=True)\n        return 1.0 - none_from",
        "return lax.cumprod(passes)",
        "test_exactness.py::test_our_rules_keep_the_law[Block]",
    ),
    Mutation(
        "noise is not shared between draft and target",
        "decoding/_coupled.py",
        "(key, position + jnp.arange(length + 1))",
        "(key, position + 1 + jnp.arange(length + 1))",
        "test_coupled.py::test_it_keeps_what_agrees_and_no_less",
    ),
    Mutation(
        "acceptance and the token after it share their random number",
        "decoding/_verify.py",
        "uniform_accept, uniform_next = jr.uniform(_round_key(key, position, _VERIFY), (2,))",
        "uniform_accept = uniform_next = jr.uniform(_round_key(key, position, _VERIFY))",
        "test_exactness.py::test_our_rules_keep_the_law[Rejection]",
    ),
    Mutation(
        "log-probabilities of one position later",
        "decoding/_round.py",
        "logprobs = sampling.logprobs(logits, distribution, emitted)",
        "logprobs = sampling.logprobs(logits, distribution, jnp.roll(emitted, 1, axis=1))",
        "test_decode.py::test_logprobs_are_those_of_the_distribution_sampled_from",
    ),
    # Cursors.
    Mutation(
        "one token too few is committed",
        "decoding/_round.py",
        "support_of(distribution), verdict.num_accepted + 1",
        "support_of(distribution), jnp.maximum(verdict.num_accepted, 1)",
        "test_decode.py::test_heads_say_the_same_greedily",
    ),
    Mutation(
        "a row goes on behind its end of sequence",
        "decoding/_state.py",
        "jnp.minimum(jnp.minimum(num_valid, until_eos), room)",
        "jnp.minimum(num_valid, room)",
        "test_decode.py::test_an_end_of_sequence_at_every_offset_of_a_block",
    ),
    Mutation(
        "finished rows move",
        "decoding/_state.py",
        "count = jnp.where(active, count, 0)",
        "count = count",
        "test_decode.py",
    ),
    Mutation(
        "a draft commits all that it guessed",
        "decoding/_round.py",
        "features, block, verdict.num_accepted, state.active)",
        "features, block, jnp.full_like(verdict.num_accepted, length), state.active)",
        "test_decode.py::test_acceptance_length_is_what_the_draft_deserves",
    ),
    Mutation(
        "positions of a block are one too high",
        "decoding/_round.py",
        "positions = (next_position - 1)[:, None]",
        "positions = next_position[:, None]",
        "test_decode.py::test_plain_decoding_is_the_argmax_of_full_forwards",
    ),
    # The model.
    Mutation(
        "attention sees the next position",
        "models/_attention.py",
        "mask = distance >= 0",
        "mask = distance >= -1",
        "test_cache.py::test_cached_forward_is_the_full_forward_after_any_accepting_and_rewinding",
    ),
    Mutation(
        "on an accelerator a block is written one slot too late",
        "models/_cache.py",
        "set(slot + jnp.arange(size, dtype=slot.dtype))",
        "set(slot + 1 + jnp.arange(size, dtype=slot.dtype))",
        "test_cache.py::test_a_block_written_position_by_position_is_one_written_whole",
    ),
    Mutation(
        "a window is one position too wide",
        "models/_attention.py",
        "(distance < sliding_window)",
        "(distance <= sliding_window)",
        "test_parity.py",
    ),
    Mutation(
        "the gate of the MLP is added",
        "models/_transformer.py",
        "return jax.nn.silu(gate) * up",
        "return jax.nn.silu(gate) + up",
        "test_parity.py",
    ),
    # Drafts and their lessons.
    Mutation(
        "Hydra's heads are taught the token after the next",
        "drafts/_hydra.py",
        "newest = jnp.roll(tokens, -(1 + offset), axis=1)",
        "newest = jnp.roll(tokens, -(2 + offset), axis=1)",
        "test_hydra.py",
    ),
    Mutation(
        "a draft picks the features of the position before",
        "drafts/_base.py",
        "jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]",
        "jnp.take_along_axis(values, jnp.maximum(index - 1, 0)[:, None, None], axis=1)[:, 0]",
        "test_conformance.py::test_our_drafts_conform[hydra]",
    ),
    Mutation(
        "a teacher one position off",
        "distill/_step.py",
        "offsets = jnp.arange(new)[None, :, None] + 1 + jnp.arange(num_draft)[None, None]",
        "offsets = jnp.arange(new)[None, :, None] + jnp.arange(num_draft)[None, None]",
        "test_draft_step.py",
    ),
    Mutation(
        "the target is differentiated by the draft's loss",
        "distill/_losses.py",
        "return jnp.sum(jnp.abs(target_probs - draft_probs), axis=-1) / 2",
        "return jnp.sum(jnp.abs(target_probs - draft_probs), axis=-1)",
        "test_distill_losses.py::test_values_by_hand",
    ),
    Mutation(
        "drawn with other logits than reported",
        "drafts/_tempered.py",
        "return self.sampler(logits / self.temperature[offset], offset, support)",
        "return (self.sampler(logits / self.temperature[offset], offset, support)[0], "
        "self.sampler(logits, offset, support)[1])",
        "test_tempered.py::test_the_whole_certificate",
    ),
    # GRPO.
    Mutation(
        "the ratio is not clipped above",
        "grpo/losses/_clipped.py",
        "jnp.clip(ratio, 1 - self.epsilon, 1 + epsilon_high)",
        "jnp.maximum(ratio, 1 - self.epsilon)",
        "test_grpo_math.py::test_clip_by_hand",
    ),
    Mutation(
        "padding counts",
        "grpo/_policy_loss.py",
        "return jnp.where(completion_mask, x.astype(jnp.float32), 0.0)",
        "return x.astype(jnp.float32)",
        "test_grpo_math.py::test_losses_accumulate_and_ignore_padding",
    ),
    Mutation(
        "a micro-batch is divided by its own tokens",
        "grpo/losses/_average.py",
        "return _counted(token_losses, completion_mask).sum() / jnp.maximum(normalizer.num_tokens, 1.0)",
        "return _counted(token_losses, completion_mask).sum() / jnp.maximum(completion_mask.sum(), 1.0)",
        "test_grpo_math.py::test_accumulation_trap",
    ),
    Mutation(
        "k3 has the wrong sign",
        "grpo/_kl.py",
        "return jnp.expm1(-difference) + difference",
        "return jnp.expm1(difference) - difference",
        "test_grpo_math.py::test_kl_estimators",
    ),
    Mutation(
        "truncated sampling is forgotten by the loss, which normalises over the whole vocabulary",
        "grpo/_step.py",
        "        support=support,\n",
        "",
        "test_truncated.py::test_the_first_inner_steps_ratios_are_1",
    ),
    Mutation(
        "what is recorded as kept belongs to the token before",
        "decoding/_round.py",
        "support, num_valid = support_of(distribution)",
        "support, num_valid = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), support_of(distribution))",
        "test_truncated.py::test_each_token_has_the_set_that_it_was_drawn_from",
    ),
    # What a run leaves.
    Mutation(
        "a checkpoint is put in place before it is whole",
        "records/_folder.py",
        "os.replace(aside, path)",
        "shutil.copy(aside, path)",
        "test_run_folder.py::test_a_kill_while_rewinding_loses_nothing",
    ),
    Mutation(
        "weakly typed arrays come back as others",
        "files/_tree.py",
        "return leaf.at[...].set(value) if leaf.weak_type else jnp.array(value)",
        "return jnp.array(value)",
        "test_checkpoint_files.py::test_bitwise_round_trip",
    ),
    Mutation(
        "a resumed run begins with a fresh optimizer",
        "train/_state.py",
        '"policy": with_trained_part(self.policy, trees["policy"])',
        '"policy": with_trained_part(self.policy, trees["policy"]), "policy_optimizer": self.policy_optimizer',
        "test_run.py::test_killed_and_resumed_is_bitwise_a_straight_run",
    ),
    # Steps and evaluations.
    Mutation(
        "the place in the data is not in the checkpoint",
        "train/_state.py",
        'return {"position": self.position, "lessons": self.lessons.numbers()}',
        'return {"lessons": self.lessons.numbers()}',
        "test_steps_run.py::test_killed_and_resumed_is_bitwise_a_straight_run",
    ),
    Mutation(
        "what an order has learned of the items is not in the checkpoint",
        "train/_state.py",
        '"order": self.order or None',
        '"order": None',
        "test_steps_run.py::test_killed_and_resumed_is_bitwise_a_straight_run",
    ),
    Mutation(
        "groups beyond a full step are done with",
        "train/_sample.py",
        "return good[:count], places.index(good[count - 1]) + 1",
        "return good[:count], len(places)",
        "test_dynamic_sampling.py::test_every_item_is_done_with_once",
    ),
    Mutation(
        "the draft is taught rows of the step once more, in place of what was left out",
        "train/_sample.py",
        "found = rows_of_groups(rollouts.group, groups)",
        "found = np.arange(len(rollouts.group))",
        "test_dynamic_sampling.py::test_what_a_step_does_without_teaches_the_draft",
    ),
    Mutation(
        "joined groups have the prompts of others",
        "train/_groups.py",
        "padded = [np.pad(p.tokens[which]",
        "padded = [np.pad(p.tokens[: len(which)]",
        "test_dynamic_sampling.py::test_groups_of_several_batches_are_joined",
    ),
    Mutation(
        "pass@k draws with replacement",
        "evaluation/_estimates.py",
        "wrong = (samples - num_correct)[:, None] - drawn",
        "wrong = (samples - num_correct)[:, None] * (samples - drawn) / samples",
        "test_estimates.py::test_pass_at_k_by_hand",
    ),
    Mutation(
        "a prompt that stands twice is held out once",
        "tasks/_holdout.py",
        "if prompt_key(task.example(index)) not in kept",
        "if index not in held.indices",
        "test_held_out.py::test_a_prompt_that_stands_twice_is_held_out_in_both_places",
    ),
    Mutation(
        "completions of an evaluation that was cut off stay",
        "records/_evaluations.py",
        "self._keep(self._completions, kept)",
        "pass",
        "test_evaluation_records.py::test_what_comes_after_is_dropped_and_what_was_cut_off",
    ),
    Mutation(
        "the newest policy is kept as the best",
        "train/_evaluation.py",
        'best["value"] >= value',
        'best["value"] > 2',
        "test_steps_run.py::test_the_best_policy_is_kept",
    ),
    # What a run shows.
    Mutation(
        "tags of a completion go into the page as they are",
        "records/html/_page.py",
        'text.replace("<", "\\\\u003c")',
        "text",
        "test_report_page.py::test_nothing_in_a_run_is_taken_for_html",
    ),
    Mutation(
        "another script may run in the page",
        "records/html/_page.py",
        "script-src {_digest(script)}",
        "script-src 'unsafe-inline'",
        "test_report_page.py::test_the_page_needs_nothing_else_and_runs_nothing_else",
    ),
    Mutation(
        "a tracker that fails goes on failing",
        "records/trackers/_trackers.py",
        "                del self._open[name]\n",
        "",
        "test_trackers.py::test_a_tracker_that_fails_is_off_and_the_others_go_on",
    ),
    Mutation(
        "TensorBoard keeps the steps that are done again",
        "records/trackers/_tensorboard.py",
        "session_log=start",
        "session_log=None",
        "test_trackers.py::test_tensorboard",
    ),
    Mutation(
        "a resumed run is a new one to its tracker",
        "records/trackers/_trackers.py",
        "kept.get(name, {})",
        "{}",
        "test_trackers.py::test_mlflow_in_files",
    ),
    # Data, stop strings, optimizers, and what a script hands over.
    Mutation(
        "a stop string ends a row one token late",
        "decoding/_stop.py",
        "return low",
        "return min(low + 1, len(tokens))",
        "test_stop_strings.py::test_the_first_token_that_completes_one",
    ),
    Mutation(
        "rows that ended by themselves are not searched for stop strings",
        "decoding/_stop.py",
        "np.flatnonzero(lengths > self._seen[row_ids])",
        "np.flatnonzero((lengths > self._seen[row_ids]) & np.asarray(state.active))",
        "test_stop_strings.py",
    ),
    Mutation(
        "a task of a mixture begins again after a thousand items",
        "tasks/_mixture.py",
        "before = stretch * self.counts[chosen] + turns",
        "before = turns",
        "test_data_files.py::test_several_tasks_with_weights",
    ),
    Mutation(
        "vectors decay",
        "grpo/_optimizers.py",
        "lambda x: x.ndim >= 2, params",
        "lambda x: x.ndim >= 1, params",
        "test_optimizers.py::test_each_is_optax_behind_a_clip[adamw]",
    ),
    Mutation(
        "Muon orthogonalises embeddings",
        "grpo/_optimizers.py",
        "x.ndim == 2 and not is_embedding",
        "x.ndim == 2",
        "test_optimizers.py::test_muon_leaves_embeddings_to_adamw",
    ),
    Mutation(
        "a run takes the weights that it was handed",
        "config/_given.py",
        "return jnp.array(x, dtype if is_matrix else x.dtype, copy=copy)",
        "return x",
        "test_python_run.py::test_what_comes_back",
    ),
    # Many devices.
    Mutation(
        "random numbers derive from a row's place in its shard",
        "decoding/_decode.py",
        "(row_ids + first_row).astype(np.int32)",
        "(row_ids % (len(row_ids) // mesh.data) + first_row).astype(np.int32)",
        "on_devices/test_decode.py::test_tokens_are_those_of_one_device[none]",
    ),
    Mutation(
        "rows that are let in derive their random numbers without the first row's index",
        "decoding/_decode.py",
        "slots, ids + first_row, division.prompt_of(ids)",
        "slots, ids, division.prompt_of(ids)",
        "on_devices/test_decode.py::test_rows_of_several_calls_are_those_of_one",
    ),
    Mutation(
        "after a shrink every device has all rows",
        "decoding/_row_programs.py",
        "return mesh.by_shard(of_shard, (ROWS, ROWS, ROWS), ROWS)(state, store, rows)",
        "return mesh.constrain(mesh.by_shard(of_shard, (ROWS, ROWS, ROWS), ROWS)(state, store, rows), WHOLE)",
        "on_devices/test_hlo.py::test_nothing_is_sent_where_rows_begin_or_leave",
    ),
    Mutation(
        "a shrink counts places over all shards",
        "decoding/_decode.py",
        "mesh.put(keep.reshape(-1).astype(np.int32), ROWS)",
        "mesh.put(kept.astype(np.int32), ROWS)",
        "on_devices/test_decode.py::test_rows_are_left_out_and_let_in_where_they_are",
    ),
    Mutation(
        "where a shard lets in fewer rows than others, one is started anew",
        "decoding/_decode.py",
        "which[0] = rows  #",
        "which[0] = 0  #",
        "on_devices/test_decode.py::test_rows_are_left_out_and_let_in_where_they_are",
    ),
    Mutation(
        "a segment reports what one shard did",
        "decoding/_segment.py",
        "*sums, in_all = mesh.total((*jax.tree.map(jnp.subtract, after, before), after[2]))",
        "*sums, in_all = (*jax.tree.map(jnp.subtract, after, before), after[2])",
        "on_devices/test_decode.py::test_adaptive_lengths",
    ),
    Mutation(
        "each shard ends a segment by itself",
        "decoding/_segment.py",
        "return mesh.total(stops.astype(jnp.int32)) < enough",
        "return stops.astype(jnp.int32) < enough",
        "on_devices/test_hlo.py::test_what_a_round_sends[until]",
    ),
    Mutation(
        "the prompts' pass is made for all prompts on every device",
        "decoding/_row_programs.py",
        "return mesh.by_shard(of_shard, (WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS, ROWS), ROWS)(\n"
        "        modules, key, tokens, lengths, limits, row_ids, prompt_of_row\n    )",
        "return mesh.constrain(of_shard(modules, key, tokens, lengths, limits, row_ids, prompt_of_row), ROWS)",
        "on_devices/test_hlo.py::test_nothing_is_sent_where_rows_begin_or_leave",
    ),
    Mutation(
        "processes that decode together go by their own clocks",
        "decoding/_segment.py",
        "self._mesh.agreed(seconds, self._compilations.seconds - compiled)",
        "(seconds, self._compilations.seconds - compiled)",
        "test_decode_together.py::test_tokens_are_those_of_one_process",
    ),
    Mutation(
        "the product that sums over devices is divided by its outputs",
        "layout/_rules.py",
        'Rule("mlp.down.weight", 1)',
        'Rule("mlp.down.weight", 0)',
        "on_devices/test_layout.py::test_rules_follow_a_parameter_wherever_it_is",
    ),
    Mutation(
        "a run decodes on one device",
        "train/_roll_out.py",
        "        mesh=parts.mesh.for_rollouts(),\n",
        "",
        "on_devices/test_parts.py::test_a_run_decodes_on_its_mesh",
    ),
    # Which of two drafts guesses.
    Mutation(
        "who guesses depends on the token just drawn",
        "drafts/_fallback.py",
        "prefer_matches(matches.tokens, record.prefers_first, others)",
        "prefer_matches(matches.tokens, record.prefers_first & (others.tokens != matches.tokens)[:, 0], others)",
        "test_fallback.py::test_the_law_of_rollouts_is_the_targets",
    ),
    Mutation(
        "verdicts are not taken in by the record of two drafts",
        "drafts/_fallback.py",
        """        return own, other, record.judge(num_accepted, block.shape[1] - 1)

    def train_hidden""",
        """        return own, other, record

    def train_hidden""",
        "test_fallback.py::test_the_draft_that_was_right_guesses",
    ),
    Mutation(
        "all rows share one record of two drafts",
        "drafts/_track_record.py",
        "share = (self.accepted + 1) / (self.offered + 1)",
        "share = jnp.ones_like(self.offered) * ((self.accepted + 1) / (self.offered + 1)).mean(0, keepdims=True)",
        "test_fallback.py::test_a_record_of_each_row_and_class_of_match",
    ),
    Mutation(
        "what a draft expects of itself is not asked before a lookup guesses",
        "drafts/_track_record.py",
        "others = ours[:, 1] if expected is None else",
        "others = ours[:, 1] if True else",
        "test_markov.py::test_a_lookup_in_front_is_chosen_by_confidence",
    ),
    Mutation(
        "the loss of a draft's confidence reaches its heads",
        "drafts/_confidence.py",
        "lax.stop_gradient(hidden).astype",
        "hidden.astype",
        "test_markov.py::test_confidence_learns_the_acceptance_and_nothing_else_does",
    ),
    # The draft of a run, its lessons, and what is compiled for it.
    Mutation(
        "a digest that signs which flip cancel out of",
        "drafts/_digest.py",
        "mixed = _mixed(bits ^",
        "mixed = (bits ^",
        "test_draft_guard.py::test_a_digest_tells_any_change_and_nothing_else",
    ),
    Mutation(
        "a run does not look whether lessons have changed the draft",
        "train/_draft_lessons.py",
        "metrics |= guard.end(state.draft, step, lessons, can_change=can_change, remembers=remembers)",
        'metrics |= {"draft/fingerprint": draft_digest(state.draft)}',
        "test_draft_run.py::test_a_draft_that_stands_still_under_its_lessons_ends_the_run",
    ),
    Mutation(
        "what decides on lessons is not in the checkpoint",
        "train/_state.py",
        'return {"position": self.position, "lessons": self.lessons.numbers()}',
        'return {"position": self.position}',
        "test_draft_run.py::test_what_decides_on_lessons_goes_on_after_a_resume",
    ),
    Mutation(
        "lessons are never paid",
        "train/_lesson_budget.py",
        "balance += self.share * (saved or 0.0) - spent",
        "balance += self.share * (saved or 0.0)",
        "test_lesson_budget.py::test_lessons_take_no_more_than_a_quarter_of_what_they_bring[1.0]",
    ),
    Mutation(
        "a round costs the same however many positions it has",
        "decoding/_round_costs.py",
        "wanted = _at(curve, rows * (length + 1))",
        "wanted = _at(curve, rows)",
        "test_round_costs.py::test_as_many_positions_cost_as_much",
    ),
    Mutation(
        "a guess that is too high is never put right",
        "decoding/_adaptive.py",
        "((0, 1.0), (1, _PATIENCE))",
        "((0, 1.0),)",
        "test_adaptive.py::test_a_cost_that_was_guessed_too_high_is_put_right_by_patience",
    ),
    Mutation(
        "decoding waits for every program",
        "decoding/_ahead.py",
        "others = [k for k in range(self._most_length + 1) if self._name(state, store, k) in self._run]",
        "others = []",
        "test_compile_behind.py::test_a_new_length_is_compiled_while_another_one_goes_on",
    ),
    # Updates by shard.
    Mutation(
        "a shard keeps its own gradients, not the sum",
        "layout/_gather.py",
        "return None, _own_part(mesh, cotangent.astype(jnp.float32), axis)",
        "return None, mesh.data * _own_part(mesh, cotangent.astype(jnp.float32) * (mesh.shard_index() == 0), axis)",
        "on_devices/test_update.py::test_gradients_are_those_of_one_device",
    ),
    Mutation(
        "a row that comes again counts twice",
        "grpo/_division.py",
        "np.asarray(whole.completion_mask) & is_there[:, None]",
        "np.asarray(whole.completion_mask)",
        "on_devices/test_update.py::test_gradients_are_those_of_one_device",
    ),
    Mutation(
        "each shard divides by its own tokens",
        "grpo/_step.py",
        "normalizer.num_micro_batches * of_all)",
        "normalizer.num_micro_batches)",
        "on_devices/test_update.py::test_gradients_are_those_of_one_device",
    ),
    Mutation(
        "a shard's lesson counts its own positions alone",
        "distill/_step.py",
        "counts = mesh.total(mask.sum((0, 1)))",
        "counts = mask.sum((0, 1))",
        "on_devices/test_update.py::test_lessons_are_those_of_one_device",
    ),
    Mutation(
        "temperatures are fitted on one shard's rows",
        "distill/_temperature.py",
        "& is_own[of_all, None]",
        "& is_own[of_all, None] & (mesh.shard_index() == 0)",
        "on_devices/test_update.py::test_lessons_are_those_of_one_device",
    ),
    Mutation(
        "weights are whole on every device",
        "grpo/_step.py",
        "return mesh.laid_out((params, state), Layout.MASTER)",
        "return mesh.laid_out((params, state), Layout.COPY)",
        "on_devices/test_runs.py",
    ),
)


def caught(mutation: Mutation) -> bool:
    """Whether the test fails with the fault in a copy of the package."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("eqx_specgrpo", "tests", "examples", "docs", "benchmarks"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder) / "eqx_specgrpo" / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise SystemExit(f"{mutation.name}: what it changes stands {text.count(mutation.old)} times in {path.name}")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{mutation.test}"]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True
        )
    if done.returncode not in (0, 1):  # nothing was collected, or pytest itself failed: that proves nothing
        raise SystemExit(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


def table() -> str:
    """All faults and their tests, for `tests/README.md`."""
    rows = [f"| {m.name} | `{m.file}` | `{m.test}` |" for m in MUTATIONS]
    return "\n".join(["| fault | in | caught by |", "| --- | --- | --- |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    missed = []
    for mutation in MUTATIONS:
        if arguments.words and not any(word in mutation.name for word in arguments.words):
            continue
        start = time.perf_counter()
        found = caught(mutation)
        print(f"{'caught' if found else 'MISSED'}  {time.perf_counter() - start:5.0f} s  {mutation.name}", flush=True)
        if not found:
            missed.append(mutation.name)
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
