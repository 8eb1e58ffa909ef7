"""Our losses against TRL's GRPOTrainer: values and gradients on random inputs, and where the two differ.

`make test-peers` runs this, in the environment of the benchmarks; where TRL is not installed it is skipped. The
trainer's own `_compute_loss` runs, on a stand-in that has what it reads of a trainer, and whose model has the
log-probs and entropies that a test hands it.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from deltah import objectives

pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

LENGTH = 16


def batch(seed=0, n=24, t=10):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    log_probs = old + 0.5 * torch.randn(n, t, generator=g, dtype=torch.float64)
    log_probs[::4] = old[::4]
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    advantages[1::6] = 0.0
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    return log_probs, old, advantages, mask


def entropies_of(mask):
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def theirs(log_probs, old, advantages, mask, loss_type="grpo", level="token", low=0.2, high=0.2, delta=None,
           entropy_coefficient=0.0):
    """TRL's loss, and its gradients by log-probs and entropies."""
    leaves = [log_probs.clone().requires_grad_(), entropies_of(mask).requires_grad_()]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (*leaves, None), model=SimpleNamespace(training=True),
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=low, epsilon_high=high, beta=0.0,
        args=SimpleNamespace(delta=delta, steps_per_generation=1), max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1, use_vllm=False, top_entropy_quantile=1.0, aux_loss_enabled=False,
        off_policy_mask_threshold=None, use_adaptive_entropy=False, entropy_coef=entropy_coefficient,
        _entropy_bonus_enabled=entropy_coefficient != 0, _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
                                    sync_gradients=True))
    prompts = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": mask.long(),
              "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
              "num_items_in_batch": mask.sum()}
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def ours(function, log_probs, old, advantages, mask, how="sequence_mean", **settings):
    leaf = log_probs.clone().requires_grad_()
    loss = objectives.aggregate(function(leaf, old, advantages, mask, **settings), mask, how, LENGTH)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def agree(left, right):
    for x, y in zip(left, right, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
    assert right[1].abs().max() > 1e-4


def differ(left, right):
    assert not torch.allclose(left[1], right[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type, how", [("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dr_grpo", "constant"),
                                            ("dapo", "token_mean")])
def test_ratio_clips(loss_type, how, seed):
    """The types share the loss of a token and differ in what is made of it; TRL's default type is "dapo"."""
    given = batch(seed)
    function = getattr(objectives, loss_type, objectives.grpo)
    for low, high in ((0.2, 0.2), (0.2, 0.28), (0.05, 0.5)):
        agree(ours(function, *given, how, clip_low=low, clip_high=high),
              theirs(*given, loss_type, low=low, high=high))


def test_published_settings_are_not_trl_s_defaults():
    """DAPO's wider range has to be asked for, and so have the mean over sequences of GRPO and of GSPO and its range."""
    defaults = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    assert (defaults["loss_type"], defaults["epsilon"], defaults["epsilon_high"]) == ("dapo", 0.2, None)
    assert (defaults["importance_sampling_level"], defaults["delta"]) == ("token", None)
    given = batch(3, n=200)
    agree(ours(objectives.dapo, *given, "token_mean"), theirs(*given, "dapo", high=0.28))
    differ(ours(objectives.dapo, *given, "token_mean"), theirs(*given, "dapo"))
    differ(ours(objectives.gspo, *given, clip_low=0.2, clip_high=0.2), theirs(*given, "dapo", "sequence"))


@pytest.mark.parametrize("loss_type, how", [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_sequence_level_is_gspo(loss_type, how):
    for function in (objectives.gspo, objectives.gspo_token):
        for low, high in ((0.2, 0.2), (3e-4, 4e-4), (0.05, 0.1)):
            given = batch(4)
            agree(ours(function, *given, how, clip_low=low, clip_high=high),
                  theirs(*given, loss_type, "sequence", low=low, high=high))


def test_delta_is_the_dual_clip():
    given = batch(5)
    found = ours(objectives.grpo, *given, dual_clip=1.5)
    agree(found, theirs(*given, delta=1.5))
    differ(found, theirs(*given))


def test_cispo_s_epsilon_is_the_largest_weight_itself():
    """Ours is the paper's ε, above 1. Neither has a lower bound."""
    given = batch(6)
    agree(ours(objectives.cispo, *given, "token_mean", clip_high=0.4), theirs(*given, "cispo", high=1.4))
    agree(ours(objectives.cispo, *given, "token_mean"), theirs(*given, "cispo", high=5.0))
    differ(ours(objectives.cispo, *given, "token_mean", clip_high=0.4), theirs(*given, "cispo", high=0.4))


def test_an_entropy_bonus_is_averaged_over_tokens_whatever_the_losses_are():
    """So is ours in the objective "entropy_bonus", with the token mean of the losses; another mean is for both."""
    log_probs, old, advantages, mask = given = batch(7)
    for how, loss_type, same in (("token_mean", "dapo", True), ("sequence_mean", "grpo", False)):
        leaves = [log_probs.clone().requires_grad_(), entropies_of(mask).requires_grad_()]
        losses = objectives.entropy_bonus(leaves[0], old, advantages, mask, leaves[1], beta=0.3)
        loss = objectives.aggregate(losses, mask, how)
        slopes = torch.autograd.grad(loss, leaves)
        found = theirs(*given, loss_type, entropy_coefficient=0.3)
        agree((loss.detach(), *slopes) if same else slopes[:1], found if same else found[1:])
        assert torch.allclose(slopes[1], found[2]) == same
