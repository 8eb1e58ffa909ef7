"""Our losses against those that verl registers: values and gradients on random inputs, and where the two differ.

`make test-peers` runs this, in the environment of the benchmarks; where verl is not installed it is skipped. verl's
`sapo`, `gpg`, `dppo_*`, `geo_mean` and `dro` have no counterpart here.
"""

import pytest
import torch

from deltah import objectives

pytest.importorskip("verl")
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

HOW = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum-norm": "constant"}


def batch(seed=0, n=24, t=10, per_token=True):
    """r from about 0.2 to 5, some of it exactly 1; some advantages of 0; at least one token in a row."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    log_probs = old + 0.5 * torch.randn(n, t, generator=g, dtype=torch.float64)
    log_probs[::4] = old[::4]
    advantages = torch.randn(n, t if per_token else 1, generator=g, dtype=torch.float64).expand(n, t).clone()
    advantages[1::6] = 0.0
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    return log_probs, old, advantages, mask


def theirs(name, log_probs, old, advantages, mask, how="token-mean", seed=0, policy_loss=None, **settings):
    """verl's loss and its gradient by the log-probs."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
                         policy_loss=PolicyLossConfig(**policy_loss or {}), **settings)
    leaf = log_probs.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss, _ = core_algos.get_policy_loss_fn(name)(old, leaf, advantages, mask.double(), how, config)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def ours(function, log_probs, old, advantages, mask, how="token-mean", **settings):
    leaf = log_probs.clone().requires_grad_()
    loss = objectives.aggregate(function(leaf, old, advantages, mask, **settings), mask, HOW[how])
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def agree(left, right):
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
    assert right[1].abs().max() > 1e-4


def differ(left, right):
    assert not torch.allclose(left[1], right[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(3))
def test_vanilla_is_grpo_with_a_dual_clip(how, seed):
    """verl bounds the loss of A < 0 by c = 3, unasked; GRPO's paper does not, and neither does our default."""
    given = batch(seed)
    agree(ours(objectives.grpo, *given, how, dual_clip=3.0), theirs("vanilla", *given, how))
    clips = dict(clip_low=0.1, clip_high=0.4, dual_clip=1.5)
    found = ours(objectives.grpo, *given, how, **clips)
    agree(found, theirs("vanilla", *given, how, clip_ratio_low=0.1, clip_ratio_high=0.4, clip_ratio_c=1.5))
    differ(found, ours(objectives.grpo, *given, how, clip_low=0.1, clip_high=0.4))


def test_dapo_is_vanilla_with_another_range():
    given = batch(3)
    agree(ours(objectives.dapo, *given, dual_clip=10.0),
          theirs("vanilla", *given, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0))


@pytest.mark.parametrize("how", HOW)
def test_gspo_is_gspo_token(how):
    given = batch(4)
    clips = dict(clip_ratio_low=0.05, clip_ratio_high=0.1)
    agree(ours(objectives.gspo_token, *given, how, clip_low=0.05, clip_high=0.1), theirs("gspo", *given, how, **clips))
    log_probs, old, advantages, mask = batch(5, per_token=False)
    agree(ours(objectives.gspo, log_probs, old, advantages[:, 0], mask, how, clip_low=0.05, clip_high=0.1),
          theirs("gspo", log_probs, old, advantages, mask, how, **clips))


def test_what_verl_s_configuration_says_is_not_gspo_s_paper():
    """Its workers hand the configuration's average on, whatever the loss's own default is."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    assert (config.clip_ratio_low, config.clip_ratio_high, config.loss_agg_mode) == (0.2, 0.2, "token-mean")
    assert objectives.find("gspo").aggregation == HOW["seq-mean-token-mean"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip_cov(seed, clip):
    """The draw, too: both permute the candidates, in their order, with a generator of that seed."""
    given = batch(seed)
    found = ours(objectives.clip_cov, *given, fraction=0.05, covariance_low=0.1, covariance_high=2.0, seed=seed,
                 clip_low=clip, clip_high=clip)
    settings = dict(clip_ratio=clip, clip_ratio_low=clip, clip_ratio_high=clip)
    agree(found, theirs("clip_cov", *given, seed=seed, **settings,
                        policy_loss=dict(clip_cov_ratio=0.05, clip_cov_lb=0.1, clip_cov_ub=2.0)))
    differ(found, ours(objectives.grpo, *given, clip_low=clip, clip_high=clip))
    # With a fraction that makes less than one token, both take one.
    agree(ours(objectives.clip_cov, *given, covariance_low=0.1, seed=seed),
          theirs("clip_cov", *given, seed=seed, policy_loss=dict(clip_cov_lb=0.1)))


@pytest.mark.parametrize("seed", range(3))
def test_kl_cov(seed):
    """verl's own default of κ is 0.1, the published runs' and ours is 1."""
    given = batch(seed)
    for fraction, coefficient in ((0.05, 1.0), (0.3, 0.1), (2e-4, 1.0)):
        found = ours(objectives.kl_cov, *given, fraction=fraction, kl_coefficient=coefficient)
        agree(found, theirs("kl_cov", *given, policy_loss=dict(kl_cov_ratio=fraction, ppo_kl_coef=coefficient)))
        # The one token that 2e-4 of this batch makes may have r = 1, where the penalty has no gradient.
        if fraction > 1e-3:
            differ(found, ours(objectives.kl_cov, *given, fraction=fraction, kl_coefficient=0.0))
    assert PolicyLossConfig().ppo_kl_coef == 0.1


def test_cispo_bounds_the_weight_below_too():
    """We take the paper's side, that has no lower bound in effect, unless `clip_low` is given."""
    given = batch(6)
    clips = dict(clip_ratio_low=0.3, clip_ratio_high=0.4)
    agree(ours(objectives.cispo, *given, clip_low=0.3, clip_high=0.4), theirs("cispo", *given, **clips))
    one_sided = ours(objectives.cispo, *given, clip_high=0.4)
    differ(one_sided, theirs("cispo", *given, **clips))
    agree(one_sided, theirs("cispo", *given, clip_ratio_low=1.0, clip_ratio_high=0.4))


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
def test_an_entropy_bonus_is_averaged_as_the_losses_are(how):
    log_probs, old, advantages, mask = batch(7)
    entropies = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = objectives.aggregate(objectives.entropy_bonus(log_probs, old, advantages, mask, entropies, beta=0.3), mask,
                                 HOW[how])
    loss = theirs("vanilla", log_probs, old, advantages, mask, how, clip_ratio_c=1e9)[0]
    torch.testing.assert_close(found, loss - 0.3 * core_algos.agg_loss(entropies, mask.double(), how), rtol=1e-6,
                               atol=1e-9)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_groups(scale):
    """A group of one is worth nothing to us, as a reward equal to its mean; verl takes its reward as the advantage."""
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(13, generator=g), torch.arange(13) // 4
    one = torch.ones(13, 1)
    found, _ = core_algos.compute_grpo_outcome_advantage(rewards[:, None].clone(), one, groups.numpy(),
                                                         norm_adv_by_std_in_grpo=scale)
    expected = objectives.group_advantages(rewards, groups, scale)
    torch.testing.assert_close(found[:12, 0], expected[:12], rtol=1e-5, atol=1e-6)
    assert expected[12] == 0 and found[12, 0] == pytest.approx(float(rewards[12]), rel=1e-5)
