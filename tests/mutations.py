"""Faults that a careful engineer could make, each with the tests that have to notice it: the data of `tests.mutate`.

To add a fault, write `"What is wrong.": (old, new)` under its file in `FAULTS`, and name the tests of a new file in `TESTS`;
then `make mutate MUTATE_ARGS='--only "What is wrong"'`. A fault that is not noticed needs a test. If you change a line that is
the old text of a fault, `tests/test_mutations.py` fails and names the fault: adapt it.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault in one file.

    Attributes:
        fault: what is wrong, in one sentence.
        file: where, from the project's root.
        old: text that occurs in it once.
        new: what the fault puts in its place.
        tests: files, or single tests (`FILE::TEST`) of a file that takes long.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# These tests, below tests/, have to notice the faults of a file. Of test files that take long, single tests are named.
TESTS = {
    "advcl_hub/attacks.py": "test_attacks.py test_attacks_losses.py",
    "advcl_hub/pretraining/advcl.py": "pretraining/test_advcl.py training/test_state.py::test_which_weights_are_exported",
    "advcl_hub/pretraining/method.py": "pretraining/test_advcl.py",
    "advcl_hub/pretraining/losses.py": "pretraining/test_losses.py "
    "train/test_pretrain_ranks.py::test_loss_and_gradient_equal_one_process",
    "advcl_hub/pretraining/views.py": "pretraining/test_views.py::test_make_views_puts_the_views_together "
    "pretraining/test_views_distributions.py",
    "advcl_hub/pretraining/deacl.py": "pretraining/test_deacl.py",
    "advcl_hub/pretraining/profeat.py": "pretraining/test_profeat.py",
    "advcl_hub/pretraining/pseudo_label_at.py": "pretraining/test_pseudo_label_at.py",
    "advcl_hub/pretraining/pseudo_labels.py": "pretraining/test_pseudo_labels_seeds.py "
    "pretraining/test_pseudo_labels.py::test_features_are_compared_by_direction "
    "pretraining/test_pseudo_labels.py::test_every_part_of_the_key_matters "
    "pretraining/test_pseudo_labels.py::test_labels_follow_subsets_and_permutations",
    "advcl_hub/models/branch_norm.py": "models/test_branch_norm.py models/test_branch_norm_plain.py",
    "advcl_hub/models/pixel_space.py": "evaluation/test_runner.py",
    "advcl_hub/models/preprocessing.py": "data/test_matching_timm.py::test_a_model_sees_the_pixels_that_it_sees_in_timm",
    "advcl_hub/finetuning/objective.py": "finetuning/test_objective.py",
    "advcl_hub/finetuning/trainer.py": "finetuning/test_trainer_schedule.py "
    "finetuning/test_runner.py::test_what_a_protocol_trains "
    "finetuning/test_runner.py::test_the_averaged_weights_are_exported "
    "finetuning/test_runner.py::test_the_best_epoch_on_held_out_images_is_exported "
    "finetuning/test_runner.py::test_accumulated_parts_give_the_step_of_the_whole",
    "advcl_hub/finetuning/features.py": "finetuning/test_features.py",
    "advcl_hub/finetuning/presets.py": "finetuning/test_presets.py",
    "advcl_hub/finetuning/lp_aff.py": "finetuning/test_lp_aff.py::test_both_stages_have_the_authors_values "
    "finetuning/test_lp_aff.py::test_the_result_is_that_of_the_stages_by_hand",
    "advcl_hub/evaluation/measure.py": "evaluation/test_runner.py "
    "evaluation/test_checks.py::test_a_random_model_gets_the_same_figures_twice",
    "advcl_hub/evaluation/quick.py": "evaluation/test_runner.py",
    "advcl_hub/evaluation/runner.py": "evaluation/test_runner_together.py evaluation/test_runner_selection.py "
    "evaluation/test_runner.py::test_robust_accuracy_of_a_known_classifier",
    "advcl_hub/evaluation/autoattack.py": "evaluation/test_autoattack.py::"
    "test_columns_fall_and_broken_images_are_not_attacked_again",
    "advcl_hub/evaluation/journal.py": "evaluation/test_journal.py evaluation/test_journal_properties.py",
    "advcl_hub/evaluation/checks.py": "evaluation/test_checks.py::test_the_columns_of_autoattack_are_compared "
    "evaluation/test_checks.py::test_adversarial_images_that_are_no_numbers_are_beyond_every_budget",
    "advcl_hub/evaluation/results.py": "records/test_tables.py",
    "advcl_hub/records/tables.py": "records/test_tables.py",
    "advcl_hub/records/reading.py": "records/test_reading_properties.py",
    "advcl_hub/data/sources.py": "data/test_matching_class_order.py::test_the_order_is_timms data/test_sources.py",
    "advcl_hub/data/matching.py": "evaluation/test_inputs.py::test_labels_follow_the_names_that_the_model_gives_its_classes",
    "advcl_hub/data/decoding.py": "data/test_image_data.py data/test_parquet.py",
    "advcl_hub/data/image_data.py": "data/test_image_data_seeds.py data/test_image_data.py",
    "advcl_hub/data/parquet.py": "data/test_parquet.py",
    "advcl_hub/hub/export.py": "hub/test_export.py hub/test_export_golden.py",
    "advcl_hub/hub/parts.py": "hub/test_parts_content.py",
    "advcl_hub/hub/download.py": "hub/test_download_content.py",
    "advcl_hub/hub/released.py": "hub/test_released.py hub/test_released_cfg.py",
    "advcl_hub/hub/registry.py": "hub/test_registry.py::test_without_a_tag_an_architecture_of_ours_takes_the_first_classifier",
    "advcl_hub/hub/push_pull.py": "hub/test_push_pull.py::test_private_and_pull_request "
    "hub/test_push_pull.py::test_two_who_push_at_once_do_not_mix_their_files "
    "hub/test_push_pull.py::test_a_version_names_weights_for_good "
    "hub/test_push_pull.py::test_an_interrupted_push_shows_nothing_half_finished_and_is_finished_by_the_same_call",
    "advcl_hub/hub/cards/text.py": "hub/test_cards_names.py",
    "advcl_hub/files.py": "test_files.py test_files_rename.py",
    "advcl_hub/training/state.py": "training/test_state.py",
    "advcl_hub/training/seeds.py": "training/test_seeds.py",
    "advcl_hub/training/loop.py": "training/test_loop.py "
    "train/test_pretrain.py::test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint",
    "advcl_hub/training/stop.py": "training/test_stop.py",
    "advcl_hub/training/pictures.py": "evaluation/test_pictures.py::test_names_with_dollar_signs_are_no_formulas",
    "advcl_hub/evaluation/inputs.py": "evaluation/test_inputs.py::test_a_model_that_needs_several_images_at_once_is_refused",
    "train/pretrain.py": "train/test_pretrain_steps.py::test_the_averaged_weights_follow_the_trained_ones "
    "train/test_pretrain_steps.py::test_every_step_draws_its_own_random_numbers "
    "train/test_pretrain_steps.py::test_the_probe_judges_the_exported_weights_on_held_out_images",
    "train/network.py": "train/test_recipe.py::test_the_published_learning_rate_step_by_step",
    "train/recipe.py": "train/test_recipe_types.py train/test_recipe_properties.py train/test_recipe.py::test_refusals",
}
# For each file: what is wrong (a sentence that occurs once), a text that occurs once in the file, and what takes its place.
FAULTS: dict[str, dict[str, tuple[str, str]]] = {
    "advcl_hub/attacks.py": {
        "A step goes down the loss.": (
            "adversarial + step_size * gradient.sign()",
            "adversarial - step_size * gradient.sign()",
        ),
        "The projection in l_inf does not clamp to [0, 1].": ("images + eps).clamp(0.0, 1.0)", "images + eps)"),
        "The ball moves along with the iterates.": ("step_size, norm), images, eps", "step_size, norm), adversarial, eps"),
        "The attack makes one step too few.": ("in range(steps):", "in range(steps - 1):"),
        "The start lies within twice eps.": (".uniform_(-eps, eps)", ".uniform_(-2 * eps, 2 * eps)"),
        "A seeded start leaves [0, 1].": ("project(images + noise, images, eps, norm)", "images + noise"),
        "Starts in the l2 ball crowd around the image.": (
            "generator.random() ** (1 / direction.numel())",
            "generator.random()",
        ),
        "The attack leaves gradients in the parameters.": (
            "(gradient,) = torch.autograd.grad(loss(leaf), leaf)",
            "loss(leaf).backward()\n            gradient = leaf.grad",
        ),
        "DLR divides by the difference of the two largest logits.": ("top[:, 0] - top[:, 2]", "top[:, 0] - top[:, 1]"),
    },
    "advcl_hub/pretraining/advcl.py": {
        "Both adversarial views start from the same noise.": (
            "uniform_start(sources, self.attack.eps), clean.detach()",
            "uniform_start(sources[:1], self.attack.eps).expand_as(sources), clean.detach()",
        ),
        "The attack keeps the graph of the clean projections.": ("clean.detach(), labels)", "clean, labels)"),
        "The pseudo-label term has no weight.": ("self.objective.pseudo_label_weight * pseudo_label", "pseudo_label"),
        "Both adversarial views share a batch-norm branch.": ('(adversarial[1], "adv_ce")', '(adversarial[1], "adv")'),
        "The adversarial view goes through the clean branch.": ('(adversarial[:1], "adv")', '(adversarial[:1], "clean")'),
        "AdvCL exports its clean branch.": ('export_branch = "adv"', 'export_branch = "clean"'),
    },
    "advcl_hub/pretraining/method.py": {
        "After an attack the parameters stay frozen.": ("p.requires_grad_(True)", "p.requires_grad_(False)"),
    },
    "advcl_hub/pretraining/losses.py": {
        "Similarities of positives have no temperature.": (".sum(2).mean() / temperature", ".sum(2).mean()"),
        "A vector is its own positive.": ("(anchors.sum(0) - anchors) / (len(views) - 1)", "anchors.sum(0) / len(views)"),
        "An anchor's own key is masked in the wrong view.": ("s.diagonal(first + start)", "s.diagonal(start)"),
        "The logarithm sums over anchors, not over keys.": ("s.logsumexp(1) for", "s.logsumexp(0) for"),
        "The published scale is upside down.": ("temperature / base_temperature)", "base_temperature / temperature)"),
        "The gradient draws positives with half the force.": ("- 2 * positives[v]", "- positives[v]"),
        "Clusterings are summed, not averaged.": ("torch.stack(losses).mean()", "torch.stack(losses).sum()"),
        "All pseudo-label heads learn the first clustering.": ("labels[:, i], reduction", "labels[:, 0], reduction"),
        "The gradient is divided by the number of processes twice.": ("temperature * len(lse)", "temperature * len(key_lse)"),
        "Every process masks the keys of the first.": ("first += rank * (len(keys) // world)", "first += 0 * rank * world"),
    },
    "advcl_hub/pretraining/views.py": {
        "The high-frequency view is made of a strong view.": ("high_frequency(weak, config", "high_frequency(strong1, config"),
        "Frequencies at the radius are removed, too.": ("columns**2 < radius**2", "columns**2 <= radius**2"),
        "Both strong views are one.": ("return first, strong_view(pixels, draw_strong(pixels, config))", "return first, first"),
        "Crops never reach the far border.": ("torch.rand_like(slack) * (slack + 1)", "torch.rand_like(slack) * slack"),
    },
    "advcl_hub/pretraining/deacl.py": {
        "DeACL weighs the wrong term.": (
            "distillation + self.objective.robust_weight * robustness",
            "self.objective.robust_weight * distillation + robustness",
        ),
        "DeACL attacks the student of the first step for ever.": ("self.attack_copy.refresh(self.encoder)", "pass"),
    },
    "advcl_hub/pretraining/profeat.py": {
        "ProFeAT's teacher sees the student's view.": (
            "self.teacher(self.inputs(views.teacher)))\n        adversarial",
            "self.teacher(self.inputs(views.student)))\n        adversarial",
        ),
        "ProFeAT's attack leaves the teacher's features.": (
            "Representations(clean.features.detach(), target.projections)",
            "target",
        ),
    },
    "advcl_hub/pretraining/pseudo_label_at.py": {
        "The attack moves running averages.": ("self.attack_copy(self.inputs(x))", 'self.features(x, "adv")'),
    },
    "advcl_hub/pretraining/pseudo_labels.py": {
        "k-means ignores the seed.": ("random_state=seed)", "random_state=0)"),
        "Labels of another seed are taken from the cache.": ('        "seed": str(seed),\n', ""),
        "k-means gets features of any length.": ("F.normalize(batch, dim=1).cpu()", "batch.cpu()"),
        "A subset gets the pseudo-labels of the first images.": ("column[indices].long()", "column[: len(indices)].long()"),
    },
    "advcl_hub/models/branch_norm.py": {
        "After a `with` block the first branch is active.": ("self.active = previous", "self.active = self.names[0]"),
        "All branches are one batch norm.": ("copy.deepcopy(norm) for name", "norm for name"),
        "The plain network has the norms of the first branch.": (
            "leaf, child.bn_branches[branch])",
            "leaf, [*child.bn_branches.values()][0])",
        ),
        "Branch adv takes the weights of adv_ce, too.": ('match["branch"] == branch', 'match["branch"].startswith(branch)'),
    },
    "advcl_hub/models/pixel_space.py": {
        "The mean is taken away after the division by std.": (
            "(images - self.mean) / self.std",
            "images / self.std - self.mean",
        ),
    },
    "advcl_hub/models/preprocessing.py": {
        "Enlarged images leave [0, 1].": ("antialias=True).clamp(0, 1)", "antialias=True)"),
    },
    "advcl_hub/finetuning/objective.py": {
        "The batch norms of a frozen encoder move in ALF.": ("if self.settings.frozen:", "if not self.settings.attacks:"),
        "After an attack a frozen encoder is in training mode.": ("network.train(training)", "network.train()"),
        "TRADES has no beta.": ("natural + s.beta * robust", "natural + robust"),
        "TRADES has its divergence the wrong way round.": (
            "F.kl_div(self._logits(adversarial).log_softmax(1), clean.softmax(1), reduction",
            "F.kl_div(clean.log_softmax(1), self._logits(adversarial).softmax(1), reduction",
        ),
        "TRADES starts where its gradient is 0.": ("images + _TRADES_START * noise", "images.clone()"),
    },
    "advcl_hub/finetuning/trainer.py": {
        "ALF trains the encoder.": ("if settings.frozen:", "if settings.caches:"),
        "The averaged weights are not exported.": ("self.ema.module if self.ema else self.model).state", "self.model).state"),
        "Gradients of parts are summed, not averaged.": ("losses.total / parts)", "losses.total)"),
        "Clean accuracy chooses the epoch of adversarial training.": (
            '"robust" if s.attacks else "standard"\n',
            '"standard"\n',
        ),
        "The learning rate falls a step too late.": ("epoch >= milestone", "epoch > milestone"),
        "The averaged weights lag a step behind.": ("self.model, self.state.step + 1)", "self.model, self.state.step)"),
    },
    "advcl_hub/finetuning/features.py": {
        "Features of several processes are in another order than the images.": (
            ".tensor_split(processes.count)[processes.rank]",
            "[processes.rank :: processes.count]",
        ),
    },
    "advcl_hub/finetuning/presets.py": {
        "The attack's step does not follow eps.": ('= overrides["eps"] / 4', "= 2 / 255"),
        "A linear head learns slower in small batches, too.": (
            '"lr" not in given and not settings.frozen',
            '"lr" not in given',
        ),
    },
    "advcl_hub/finetuning/lp_aff.py": {
        "LP-AFF's second stage has two branches.": ('["branches"] = ONE', '["branches"] = ("clean", "adv")'),
        "LP-AFF throws the head of its first stage away.": ("keep_head=bool(runs)", "keep_head=False"),
    },
    "advcl_hub/evaluation/measure.py": {
        "The seed does not reach the random starts.": ("(protocol.seed, restart, index) for", "(restart, index) for"),
        "Every restart starts in the same place.": ("protocol.seed, restart, index) for", "protocol.seed, index) for"),
        "The random start belongs to a place in the batch.": ("for index in indices]", "for index in range(len(indices))]"),
        "A batch's random numbers depend on those before it.": ("torch.manual_seed(self.protocol.seed)", "pass"),
    },
    "advcl_hub/evaluation/quick.py": {
        "Robust accuracy is that of images right when clean.": ("survive / n, n,", "survive / max(len(right), 1), n,"),
    },
    "advcl_hub/evaluation/runner.py": {
        "The worst case is that of the last attack.": (
            "[all(flags) for flags in zip(*survives.values(), strict=True)]",
            "list(survives.values())[-1]",
        ),
        "Images are chosen without regard to classes.": ("images.subset(images.balanced_positions(n))", "images.sample(n)"),
        "The record counts all images, not those measured.": ('"images": len(chosen)', '"images": len(images)'),
        "Images that the first start breaks count as robust.": ("restart < 0 for restart", "restart <= 0 for restart"),
    },
    "advcl_hub/evaluation/autoattack.py": {
        "AutoAttack goes without Square.": ("if name in unable:", 'if name in unable or name == "square":'),
        "Images that one attack broke are attacked again.": (", strict=True) if survives]", ", strict=True)]"),
    },
    "advcl_hub/evaluation/journal.py": {
        "A continued journal glues a line to the last one.": (
            "self.file.truncate(whole)",
            "self.file.truncate(max(whole - 1, 0))",
        ),
        "A journal of another protocol is continued.": ('entry.get("header") != header:', '"header" not in entry:'),
    },
    "advcl_hub/evaluation/checks.py": {
        "PGD may be far stronger than AutoAttack.": ("-_SLACK <= pgd - last <= 2 * _GAIN", "pgd - last <= 2 * _GAIN"),
        "Distances that are no numbers are within eps.": (
            "v if math.isfinite(v) else math.inf",
            "v if math.isfinite(v) else 0.0",
        ),
    },
    "advcl_hub/evaluation/results.py": {
        "The interval of Wilson has a wrong centre.": ("p + z * z / (2 * total)", "p + z * z / total"),
    },
    "advcl_hub/records/tables.py": {
        "A part of the images passes for all of them.": ('if data["images"] != data["of"]:', 'if not data["of"]:'),
        "A table shows only the first warning.": ('for warning in r["warnings"]]', 'for warning in r["warnings"][:1]]'),
    },
    "advcl_hub/records/reading.py": {
        "Text of others brings HTML into cards.": ('.replace("<", "&lt;")', ""),
    },
    "advcl_hub/data/sources.py": {
        "Class 10 comes before class 2.": ("int(part) if part.isdecimal() else part", "part"),
        "Held-out images are drawn without regard to classes.": (
            "random.permutation(rows)[:count]",
            "random.permutation(len(labels))[:count]",
        ),
    },
    "advcl_hub/data/matching.py": {
        "Labels are renumbered backwards.": ("order[data.labels]", "order.argsort()[data.labels]"),
    },
    "advcl_hub/data/decoding.py": {
        "JPEGs are decoded at an eighth of their size.": (
            "with _open(item) as opened:\n",
            "with _open(item) as opened:\n        opened.draft(None, (1, 1))\n",
        ),
        "Images are resized bilinearly.": ("InterpolationMode.BICUBIC", "InterpolationMode.BILINEAR"),
        "Pictures of 16 bits are decoded to white.": (
            'image.mode in ("I", "F") or image.mode.startswith("I;")',
            'image.mode == "F"',
        ),
    },
    "advcl_hub/data/image_data.py": {
        "Held-out images are trained on.": ("return data.subset((~held_out).nonzero()[:, 0]), ", "return data, "),
        "Few-shot images are the same for every seed.": ("PCG64([seed, label])", "PCG64([label])"),
        "A subset numbers its images anew.": ("indices=self.indices[here])", "indices=torch.arange(len(here)))"),
    },
    "advcl_hub/data/parquet.py": {
        "Shard 10 comes before shard 2.": ("key=lambda file: (file.number, file.name))", "key=lambda file: file.name)"),
    },
    "advcl_hub/hub/export.py": {
        "Only the weights of an export are checked.": ("in recorded.items():", "in [(WEIGHTS, recorded[WEIGHTS])]:"),
        "An output that is not a number is taken as golden.": ("if not difference < 1e-3:", "if difference >= 1e-3:"),
        "The golden output may differ by a tenth.": ("if not difference < 1e-3:", "if not difference < 0.1:"),
        "Running variances are rounded to float16.": ('(("running_mean", "running_var"))', '("running_mean")'),
    },
    "advcl_hub/hub/parts.py": {
        "A damaged file that was joined before is used.": ("path.is_file() and file_sha256(path) == sha256", "path.is_file()"),
        "Weights that differ in the sign of 0 are shared.": (".reshape(-1).view(torch.uint8)", ".reshape(-1)"),
    },
    "advcl_hub/hub/download.py": {
        "A file of the right size is not hashed.": (
            ') != expected["sha256"]:',
            ') != expected["sha256"] and "size" not in expected:',
        ),
    },
    "advcl_hub/hub/released.py": {
        "A name in the data file may lead out of its folder.": ('check_name(name, entry["config"]["architecture"])', "pass"),
        "A config says from where weights are loaded.": ('{*SOURCES, "custom_load"}', '{"custom_load"}'),
        "A release loses its mean and std.": ('{*SOURCES, "custom_load"}', '{*SOURCES, "mean", "std", "custom_load"}'),
    },
    "advcl_hub/hub/registry.py": {
        "A bare name means the first weights, also an encoder.": ("cfg.num_classes == _bare[architecture]", "name"),
    },
    "advcl_hub/hub/push_pull.py": {
        "A private push makes a public repository.": ("create_repo(repository, private=private)", "create_repo(repository)"),
        "Two who push at once mix their files.": ("                parent_commit=remote.info.sha,\n", ""),
        "What was uploaded is not looked at again.": (
            "        _verify_uploaded(repository, commit, parts)\n",
            "        pass\n",
        ),
        "A version may get other weights.": ("if {WEIGHTS, PROJECTOR, CONFIG} & _differing(there, parts):", "if False:"),
    },
    "advcl_hub/hub/cards/text.py": {
        "Names in a record are not escaped in a card.": ("{_escaped(key): _escaped(value)", "{key: _escaped(value)"),
    },
    "advcl_hub/files.py": {
        "A file is copied to its place, not renamed.": ("draft.replace(path)", "path.write_bytes(draft.read_bytes())"),
        "Passwords in addresses are published.": ('_SECRET.sub("", record)', "record"),
    },
    "advcl_hub/training/state.py": {
        "A continued run forgets the optimizer's momentum.": ('{"state": state, "param', '{"state": {}, "param'),
        "A continued run forgets the averaged weights.": ('ema.load_state_dict(group(tensors, "ema"))', "pass"),
    },
    "advcl_hub/training/seeds.py": {
        "All steps of a run draw the same noise.": ("mix(_STEP, seed, step, rank)", "mix(_STEP, seed, rank)"),
        "Every epoch has the same order.": ("mix(_ORDER, seed, epoch)", "mix(_ORDER, seed)"),
    },
    "advcl_hub/training/loop.py": {
        "A continued epoch begins with its first batch again.": (
            "shares[self.state.step - epoch * self.steps_per_epoch :, self.rank]",
            "shares[:, self.rank]",
        ),
        "All processes train on the same images.": ("* self.steps_per_epoch :, self.rank]", "* self.steps_per_epoch :, 0]"),
        "Curves are drawn at every checkpoint.": ("+ _DRAW_EVERY * (end - start)", "+ 0 * (end - start)"),
        "A run that breaks off leaves no curves.": ("self.draw(now=True)  # the curves", "pass  # the curves"),
    },
    "advcl_hub/training/stop.py": {"A second Ctrl-C is ignored.": ("raise KeyboardInterrupt", "return")},
    "advcl_hub/training/pictures.py": {"A dollar sign in a name begins a formula.": ("text.set_parse_math(False)", "pass")},
    "advcl_hub/evaluation/inputs.py": {
        "One image alone is not tried.": ("_check_logits(_of_one(classifier, x[:1]), 1,", "(1,")
    },
    "train/pretrain.py": {
        "The averaged weights of a pretraining lag a step behind.": (
            "(self.core, self.state.step + 1)",
            "(self.core, self.state.step)",
        ),
        "A continued run draws the noise of the first step.": ("seed, self.state.step, self.rank)", "seed, 0, self.rank)"),
        "The probe judges weights that are not averaged.": (
            "(self.ema.module if self.ema else self.core).encoder",
            "self.core.encoder",
        ),
    },
    "train/network.py": {
        "The learning rate falls from the first step on.": ("round(c.warmup_epochs * steps_per_epoch)", "0"),
    },
    "train/recipe.py": {
        "Fractions are cut to whole numbers.": ("float(Fraction(value) if", "float(int(Fraction(value)) if"),
        "An infinite setting is taken.": (" and math.isfinite(value))", ")"),
        "An unknown key is ignored.": (
            "for key in value:\n            if key not in known:",
            "value = {key: v for key, v in value.items() if key in known}\n        for key in ():",
        ),
        "True passes for the number 1.": ("elif type(value) is kind:", "elif isinstance(value, kind):"),
    },
}
MUTATIONS = tuple(
    Mutation(fault, file, old, new, tuple(f"tests/{name}" for name in TESTS[file].split()))
    for file, faults in FAULTS.items()
    for fault, (old, new) in faults.items()
)
