"""Methods that treat few tokens apart: which ones, what becomes of them, and over what a batch is taken."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import deltah as dh
from deltah import objectives


def batch(seed=0, n=30, t=8, vocabulary=5, per_token=True):
    """Tokens drawn from next-token distributions that are known in full; NaN outside the mask."""
    g = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(n, t, vocabulary, generator=g, dtype=torch.float64)).softmax(-1)
    tokens = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(n, t, 1)
    log_probs = p.log().gather(-1, tokens)[..., 0]
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    old = log_probs + 0.3 * torch.randn(n, t, generator=g, dtype=torch.float64)
    advantages = torch.randn(n, t if per_token else 1, generator=g, dtype=torch.float64).expand(n, t).clone()
    if per_token:
        advantages[:, 0] = 0.0
    found = dict(log_probs=log_probs, old_log_probs=old, advantages=advantages, entropies=-(p * p.log()).sum(-1),
                 collisions=p.square().sum(-1), collision_log_probs=(p.square() * p.log()).sum(-1))
    return {"p": p, "mask": mask} | {name: torch.where(mask, x, math.nan) for name, x in found.items()}


def of(values, *names):
    return {name: values[name] for name in names}


COMMON = ("log_probs", "old_log_probs", "advantages", "mask")
RANKED = ("log_probs", "advantages", "mask")
MOMENTS = ("entropies", "collisions", "collision_log_probs")


def covariances(b):
    """By hand, of the mask's tokens in order."""
    a, lp = (b[name][b["mask"]].numpy() for name in ("advantages", "log_probs"))
    return (a - a.mean()) * (lp - lp.mean())


def test_token_covariances_average_to_the_covariance():
    b = batch()
    found = objectives.token_covariances(**of(b, *RANKED) | {"log_probs": b["log_probs"].requires_grad_()})
    b["log_probs"] = b["log_probs"].detach()
    assert not found.requires_grad
    assert found[b["mask"]].numpy() == pytest.approx(covariances(b), rel=1e-12) and not found[~b["mask"]].any()
    a, lp = (b[name][b["mask"]].numpy() for name in ("advantages", "log_probs"))
    assert float(found[b["mask"]].mean()) == pytest.approx(np.cov(a, lp, bias=True)[0, 1])


def eligible(b, low, high, clip):
    """Clip-Cov's candidates by hand, [N, T]."""
    r, a = np.exp((b["log_probs"] - b["old_log_probs"])[b["mask"]].numpy()), b["advantages"][b["mask"]].numpy()
    c = covariances(b)
    free = ~((a > 0) & (r > 1 + clip) | (a < 0) & (r < 1 - clip))
    assert 0 < (~free & (c > low) & (c < high)).sum()
    found = torch.zeros_like(b["mask"])
    found[b["mask"]] = torch.tensor(free & (c > low) & (c < high))
    return found


def test_clip_cov_draws_evenly_from_what_lies_within_the_bounds():
    b = batch()
    candidates = eligible(b, 0.2, 2.0, 0.2)
    count, tokens = int(candidates.sum()), int(b["mask"].sum())
    settings = dict(covariance_low=0.2, covariance_high=2.0)
    choose = functools.partial(objectives.clip_cov_tokens, **of(b, *COMMON), **settings)
    drawn = torch.zeros(b["mask"].shape)
    for seed in range(300):
        found = choose(fraction=0.05, seed=seed)
        assert int(found.sum()) == int(0.05 * tokens) < count and not (found & ~candidates).any()
        drawn += found
    # Each candidate as often as another: χ² of a draw without replacement, within five of its deviations.
    mean = 300 * int(0.05 * tokens) / count
    statistic = float((drawn[candidates] - mean).square().sum()) / (mean * (1 - int(0.05 * tokens) / count))
    assert abs(statistic - (count - 1)) < 5 * (2 * (count - 1)) ** 0.5
    assert int(choose(fraction=1e-9).sum()) == 1
    assert torch.equal(choose(fraction=1.0), candidates)


def test_clip_cov_s_draw_is_its_seed_s_alone():
    b = batch()
    choose = functools.partial(objectives.clip_cov_tokens, **of(b, *COMMON), fraction=0.1, covariance_low=0.0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = choose(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, choose(seed=3)) and not torch.equal(first, choose(seed=4))
    # Nor does it depend on the width of the padding or on the numbers' precision.
    wide = {k: torch.nn.functional.pad(x, (0, 3)) for k, x in of(b, *COMMON).items()}
    again = objectives.clip_cov_tokens(**wide, fraction=0.1, covariance_low=0.0, seed=3)
    assert torch.equal(again[:, :8], first) and not again[:, 8:].any()
    assert torch.equal(first, choose(log_probs=b["log_probs"].float(), seed=3))


def test_clip_cov_removes_gradients_and_no_token():
    b = batch()
    settings = dict(fraction=0.05, covariance_low=0.2, covariance_high=2.0, seed=7)
    tokens = objectives.clip_cov_tokens(**of(b, *COMMON), **settings)
    leaf = b["log_probs"].clone().requires_grad_()
    losses = objectives.clip_cov(leaf, b["old_log_probs"], b["advantages"], b["mask"], **settings)
    (slopes,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    plain = objectives.grpo(leaf, b["old_log_probs"], b["advantages"], b["mask"])
    (expected,) = torch.autograd.grad(plain.sum(), leaf)
    assert expected[tokens].abs().min() > 0 and int(tokens.sum()) == int(0.05 * b["mask"].sum())
    assert torch.equal(slopes, torch.where(tokens, 0.0, expected))
    assert torch.equal(losses, torch.where(tokens, 0.0, plain))


def test_kl_cov_penalises_the_highest_covariances():
    b = batch()
    tokens = objectives.kl_cov_tokens(**of(b, *RANKED), fraction=0.04)
    c, count = covariances(b), int(0.04 * b["mask"].sum())
    assert count > 3 and tokens[b["mask"]].numpy().nonzero()[0].tolist() == sorted(np.argsort(-c)[:count].tolist())
    assert not tokens[~b["mask"]].any() and int(objectives.kl_cov_tokens(**of(b, *RANKED), fraction=1e-9).sum()) == 1
    assert torch.equal(objectives.kl_cov_tokens(**of(b, *RANKED), fraction=1.0), b["mask"])
    leaf = b["log_probs"].clone().requires_grad_()
    losses = objectives.kl_cov(leaf, b["old_log_probs"], b["advantages"], b["mask"], 0.04, 0.7)
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    log_r = b["log_probs"] - b["old_log_probs"]
    value = -log_r.exp() * b["advantages"]
    expected = torch.where(b["mask"], value + 0.7 * log_r.abs() * tokens, 0.0)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(slopes, torch.where(b["mask"], value + 0.7 * log_r.sign() * tokens, 0.0))


def test_kl_cov_s_penalty_has_no_gradient_on_the_first_minibatch():
    b = batch()
    leaf = b["log_probs"].clone().requires_grad_()
    losses = objectives.kl_cov(leaf, b["log_probs"], b["advantages"], b["mask"], fraction=1.0, kl_coefficient=100.0)
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.equal(slopes, torch.where(b["mask"], -b["advantages"], 0.0))


def discriminators(b):
    """S and D by hand, from the distributions in full: D = S − Σ_i p_i S_i."""
    p, h = b["p"].numpy(), b["entropies"].nan_to_num().numpy()
    every = p * (h[..., None] + np.log(p))
    lp = b["log_probs"].nan_to_num().numpy()
    s = np.exp(lp) * (h + lp)
    mask = b["mask"].numpy()
    return s[mask], (s - (p * every).sum(-1))[mask]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.3])
def test_clip_b_drops_what_lies_far_below_the_mean(threshold):
    b = batch()
    s, a = discriminators(b)[0], b["advantages"][b["mask"]].numpy()
    expected = (a < 0) & (s - s.mean() < -threshold * s.std())
    assert 0 < expected.sum() < (a < 0).sum() and ((a >= 0) & (s - s.mean() < -threshold * s.std())).any()
    found = objectives.clip_b_tokens(**of(b, *RANKED, "entropies"), threshold=threshold)
    assert found[b["mask"]].tolist() == expected.tolist() and not found[~b["mask"]].any()


def test_clip_v_drops_what_lies_far_below_zero_the_lowest_first():
    b = batch(n=200)
    d, a = discriminators(b)[1], b["advantages"][b["mask"]].numpy()
    below = (a < 0) & (d < -0.8 * d.std())
    assert below.sum() > 8 and ((a == 0) & (d < -0.8 * d.std())).any()
    # Centred at zero, not at the mean.
    assert below.tolist() != ((a < 0) & (d - d.mean() < -0.8 * d.std())).tolist()
    given = of(b, *RANKED, *MOMENTS)
    found = objectives.clip_v_tokens(**given, threshold=0.8, fraction=1.0)
    assert found[b["mask"]].tolist() == below.tolist() and not found[~b["mask"]].any()
    for fraction, count in ((1e-4, 1), (0.03, int(0.03 * len(d)))):
        found = objectives.clip_v_tokens(**given, threshold=0.8, fraction=fraction)
        lowest = sorted(np.where(below)[0][np.argsort(d[below])[:count]].tolist())
        assert found[b["mask"]].numpy().nonzero()[0].tolist() == lowest


@pytest.mark.parametrize("name, more", [("clip_b", ("entropies",)), ("clip_v", MOMENTS)])
def test_clip_b_and_clip_v_change_the_mask(name, more):
    """Losses and gradients are GRPO's, but for what is dropped; a mean over tokens divides by what is left."""
    b = batch(per_token=False)
    settings = {"threshold": 0.8} | ({"fraction": 0.04} if name == "clip_v" else {})
    tokens = getattr(objectives, name + "_tokens")(**of(b, *RANKED, *more), **settings)
    kept, count = b["mask"] & ~tokens, int(tokens.sum())
    leaf = b["log_probs"].clone().requires_grad_()
    losses = getattr(objectives, name)(**of(b, *COMMON, *more) | {"log_probs": leaf}, **settings)
    plain = objectives.grpo(leaf, b["old_log_probs"], b["advantages"], b["mask"])
    assert count > 2 and torch.equal(losses, torch.where(tokens, 0.0, plain))
    assert torch.equal(*(torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0]
                         for x in (losses, torch.where(tokens, 0.0, plain))))
    objective = objectives.find(name)
    objective = replace(objective, dropped=functools.partial(objective.dropped, **settings))
    rollouts = rollouts_of(b)
    found = objective.loss(b["log_probs"], b["old_log_probs"], rollouts, **of(b, *MOMENTS))
    expected = objectives.aggregate(losses, kept, "token_mean").detach()
    assert found == expected != objectives.aggregate(losses, b["mask"], "token_mean")
    assert objective.needs == more and objective.moments == (name == "clip_v")


def rollouts_of(b):
    """With the advantages of a batch that has one for each sequence."""
    mask = b["mask"]
    return dh.Rollouts(torch.zeros(len(mask), 1 + mask.shape[1]).long(),
                       torch.cat([torch.ones(len(mask), 1).bool(), mask], 1), mask, torch.arange(len(mask)),
                       advantages=b["advantages"][:, 0])


def rows_of(b, rows):
    return {name: x[rows] for name, x in b.items()}


SELECTING = {
    "clip_cov": (objectives.clip_cov, objectives.clip_cov_tokens, COMMON,
                 dict(fraction=0.03, covariance_low=0.2, covariance_high=2.0, seed=1)),
    "kl_cov": (objectives.kl_cov, objectives.kl_cov_tokens, RANKED, dict(fraction=0.02)),
    "clip_b": (objectives.clip_b, objectives.clip_b_tokens, (*RANKED, "entropies"), dict(threshold=0.8)),
    "clip_v": (objectives.clip_v, objectives.clip_v_tokens, (*RANKED, *MOMENTS), dict(threshold=0.4, fraction=0.02)),
}


@pytest.mark.parametrize("name", SELECTING)
def test_statistics_of_micro_batches_are_another_method(name):
    """Chosen in the whole batch, the tokens of micro-batches make up the method; chosen in each of them, they do not.

    Where a fraction f of the tokens is chosen, it is at least one in every micro-batch: f is inflated.
    """
    losses, choose, given, settings = SELECTING[name]
    b, parts = batch(), [slice(i, i + 2) for i in range(0, 30, 2)]
    whole = choose(**of(b, *given), **settings)
    own = torch.cat([choose(**of(rows_of(b, rows), *given), **settings) for rows in parts])
    assert 0 < int(whole.sum()) and not torch.equal(whole, own)
    if name != "clip_b":
        assert int(whole.sum()) == int(settings["fraction"] * b["mask"].sum())
        assert int(own.sum()) > 1.5 * int(whole.sum())
    objective = replace(objectives.find(name), aggregation="constant", length=1)
    if name in ("clip_cov", "kl_cov"):
        objective = replace(objective, losses=functools.partial(losses, **settings))
    else:
        objective = replace(objective, dropped=functools.partial(choose, **settings))
    b = batch(per_token=False)
    whole = choose(**of(b, *given), **settings)

    def gradient(rows, selected):
        part = rows_of(b, rows)
        leaf = part["log_probs"].clone().requires_grad_()
        loss = objective.loss(leaf, part["old_log_probs"], rollouts_of(part), **of(part, *MOMENTS), selected=selected)
        return torch.autograd.grad(loss * len(part["mask"]), leaf)[0]

    expected = gradient(slice(None), None)
    torch.testing.assert_close(torch.cat([gradient(rows, whole[rows]) for rows in parts]), expected, rtol=1e-13, atol=0)
    assert not torch.allclose(torch.cat([gradient(rows, None) for rows in parts]), expected)


@pytest.mark.parametrize("name", SELECTING)
def test_what_is_chosen_is_constant(name):
    """No gradient by way of a statistic or a score: moving a token's numbers moves no other's gradient or its own."""
    losses, choose, given, settings = SELECTING[name]
    b = batch(1)
    leaves = {x: b[x].clone().requires_grad_() for x in ("log_probs", *MOMENTS)}
    tokens = choose(**of(b | leaves, *given), **settings)
    assert tokens.dtype == torch.bool and tokens.any()
    extras = {x: leaves[x] for x in given if x in MOMENTS}
    loss = losses(leaves["log_probs"], b["old_log_probs"], b["advantages"], b["mask"], **extras, **settings).sum()
    slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert slopes[1:] == (None, None, None)
    r = (b["log_probs"] - b["old_log_probs"]).exp()
    a = b["advantages"]
    expected = -r * a if name == "kl_cov" else torch.where((a > 0) & (r > 1.2) | (a < 0) & (r < 0.8), 0.0, -r * a)
    others = b["mask"] & ~tokens
    torch.testing.assert_close(slopes[0][others], expected[others], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", SELECTING)
def test_nothing_to_choose_from(name):
    """Advantages of 0, scores that are all equal, a single token, no token: GRPO's losses, or KL-Cov's."""
    losses, choose, given, settings = SELECTING[name]
    b = batch(2)
    same = {x: torch.full_like(b[x], -0.7) for x in b if x not in ("mask", "p", "advantages")}
    cases = {"A = 0": b | {"advantages": torch.zeros_like(b["advantages"])},
             "equal scores": b | same | {"advantages": torch.full_like(b["advantages"], -1.0)},
             "one token": {x: v[:1, :1] for x, v in b.items()},
             "no token": b | {"mask": torch.zeros_like(b["mask"])}}
    for case, values in cases.items():
        tokens = choose(**of(values, *given), **settings)
        # KL-Cov takes at least one, whatever its covariance.
        assert int(tokens.sum()) == (0 if name != "kl_cov" or case == "no token" else
                                     max(1, int(0.02 * values["mask"].sum()))), case
        leaf = values["log_probs"].clone().requires_grad_()
        extras = {x: values[x] for x in given if x in MOMENTS}
        found = losses(leaf, *(values[x] for x in COMMON[1:]), **extras, **settings)
        (slopes,) = torch.autograd.grad(found.sum(), leaf)
        assert torch.isfinite(found).all() and torch.isfinite(slopes).all()
        if name != "kl_cov":
            assert torch.equal(found, objectives.grpo(leaf, *(values[x] for x in COMMON[1:])))


def test_of_equal_scores_the_first_counts():
    mask = torch.ones(2, 3, dtype=torch.bool)
    log_probs = torch.tensor([[-1.0, -2.0, -1.0], [-2.0, -1.0, -2.0]])
    found = objectives.kl_cov_tokens(log_probs, log_probs, mask, fraction=0.5)
    assert found.tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("threshold, dropped", [(1.4, True), (1.42, False)])
def test_deviations_are_the_population_s(threshold, dropped):
    """S and D of −2, 1 and 1 have a deviation of √2; the sample's would be √3."""
    values, A = torch.tensor([[-2.0, 1.0, 1.0]], dtype=torch.float64), torch.tensor([-1.0])
    mask = torch.ones(1, 3, dtype=torch.bool)
    log_probs = torch.full_like(values, 0.5).log()
    entropies, zero = 2 * values - log_probs, torch.zeros_like(values)
    for found in (objectives.clip_b_tokens(log_probs, A, mask, entropies, threshold),
                  objectives.clip_v_tokens(log_probs, A, mask, entropies, zero, zero, threshold)):
        assert found.tolist() == [[dropped, False, False]]


def test_deviations_that_are_rounding_drop_nothing():
    """Equal scores computed in different ways differ by 1e-16, and so does their mean."""
    p = torch.full((1, 60), 0.3, dtype=torch.float64)
    p[0, ::7] += 1e-16
    H, mask = torch.full_like(p, 1.1), torch.ones(1, 60, dtype=torch.bool)
    assert not objectives.clip_b_tokens(p.log(), torch.tensor([-1.0]), mask, H, threshold=0.0).any()


def test_an_objective_is_given_what_its_functions_ask_for():
    b = batch(per_token=False)
    rollouts, given = rollouts_of(b), of(b, "log_probs", "old_log_probs")
    seen = {}

    def own(log_probs, old_log_probs, advantages, mask, seed, entropies, other=2):
        seen.update(seed=seed, entropies=entropies, other=other)
        return torch.where(mask, -log_probs, 0.0)

    def dropped(log_probs, advantages, mask, collisions):
        seen.update(collisions=collisions)
        return mask & (advantages[:, None] < 0)

    objective = objectives.Objective(own, "token_mean", dropped=dropped)
    assert objective.needs == ("entropies", "collisions", "seed") and objective.moments
    loss = objective.loss(**given, rollouts=rollouts, **of(b, *MOMENTS), seed=11)
    kept = b["mask"] & (b["advantages"] >= 0)
    assert loss == pytest.approx(float(-b["log_probs"][kept].mean()))
    assert (seen["seed"], seen["other"]) == (11, 2) and torch.equal(seen["collisions"].isnan(), ~b["mask"])
    with pytest.raises(TypeError, match="^entropies: expected a tensor, got None"):
        objective.loss(**given, rollouts=rollouts)
    for wrong in (b["mask"].double(), b["mask"][1:], None):
        with pytest.raises((TypeError, ValueError), match="^dropped: expected"):
            replace(objective, dropped=lambda *_, wrong=wrong: wrong).loss(
                **given, rollouts=rollouts, **of(b, *MOMENTS))
    # What a partial has set is the caller's.
    set_already = objectives.Objective(functools.partial(own, seed=4, entropies=None))
    assert set_already.needs == () and set_already.loss(**given, rollouts=rollouts, seed=11)
    assert seen["seed"] == 4
    assert objectives.find("grpo").needs == () and objectives.find("clip_cov").needs == ("seed", "selected")


def test_the_seed_of_an_objective_draws_other_tokens():
    b = batch(per_token=False)
    objective = objectives.Objective(functools.partial(objectives.clip_cov, covariance_low=0.0, fraction=0.1))
    draw = functools.partial(objective.loss, b["log_probs"], b["old_log_probs"], rollouts_of(b))
    assert draw(seed=0) == draw() != draw(seed=1)


def test_tokens_chosen_elsewhere_are_refused_where_none_are():
    b = batch(per_token=False)
    with pytest.raises(ValueError, match="^selected: this objective treats no tokens apart"):
        objectives.find("grpo").loss(b["log_probs"], b["old_log_probs"], rollouts_of(b), selected=b["mask"])
    for name, wrong in itertools.product(SELECTING, (b["mask"].double(), b["mask"][1:], [True], 3)):
        with pytest.raises((TypeError, ValueError), match="^selected: expected"):
            objectives.find(name).loss(b["log_probs"], b["old_log_probs"], rollouts_of(b), **of(b, *MOMENTS),
                                       selected=wrong)
    for name in ("clip_cov", "kl_cov"):
        with pytest.raises(ValueError, match="^selected: expected shape"):
            getattr(objectives, name)(**of(b, *COMMON), selected=b["mask"][1:])


@pytest.mark.parametrize("name, argument, wrong", [
    *itertools.product(("clip_cov", "kl_cov", "clip_v"), ["fraction"], (0, -0.1, 1.5, math.nan)),
    *itertools.product(("clip_b", "clip_v"), ["threshold"], (-1, math.inf)),
    ("kl_cov", "kl_coefficient", -1), ("clip_cov", "seed", -1), ("clip_cov", "seed", 2**63),
    ("clip_cov", "covariance_low", math.nan), ("clip_cov", "covariance_high", math.inf)])
def test_wrong_values_are_named(name, argument, wrong):
    losses, _, given, settings = SELECTING[name]
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        losses(**of(batch(), *COMMON, *set(given) - set(COMMON)), **settings | {argument: wrong})


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_numbers_inside_the_mask(name):
    b = batch()
    b[name] = torch.where(torch.arange(8) < 1, math.nan, b[name])
    with pytest.raises(ValueError, match=f"^{name}: expected finite numbers inside the mask"):
        objectives.clip_v(**of(b, *COMMON, *MOMENTS))
