"""Token scores against brute force: real steps on the logits of random distributions, token by token."""

import math

import numpy as np
import pytest
import torch
from scipy.special import lambertw, softmax

import deltah as dh
from deltah.objectives.token_scores import SCORES
from deltah.scoring import log_probs_and_entropies

SIZES = (2, 3, 7, 40, 1000)
SIGNED = ("quadrant", "covariance", "s", "d", "first_order", "steer", "repo")


def logits_of(size, seed=0):
    """[8, V]: distributions from nearly uniform to nearly certain, one exactly uniform."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([0.0, 0.05, 0.5, 1.0, 1.5, 2.5, 4.0, 8.0], dtype=torch.float64)
    return sharpness[:, None] * torch.randn(8, size, dtype=torch.float64, generator=generator)


def every_token(logits):
    """Scores [states, V] of every token of each distribution, as if each had been sampled."""
    *fields, = log_probs_and_entropies(logits[:, None].expand(-1, logits.shape[1], -1),
                                       torch.arange(logits.shape[1]).expand(len(logits), -1), moments=True)
    return dh.TokenScores(*fields)


def arguments(logits, seed=1):
    """What a score takes, for every token of each distribution; the old policy is another one."""
    scores, generator = every_token(logits), torch.Generator().manual_seed(seed)
    noise, advantages = torch.randn(2, *logits.shape, dtype=torch.float64, generator=generator)
    return scores, scores.log_probs + 0.3 * noise, advantages, torch.ones_like(logits, dtype=torch.bool)


def entropy_of(logits):
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def change(logits, step):
    """d H(z + η · step) / dη at η = 0, from the definition of H."""
    return torch.func.jvp(entropy_of, (logits,), (step.clone(memory_format=torch.contiguous_format),))[1]


def steps(logits, old_log_probs, advantages):
    """A gradient step on −r A of each token alone, [states, V, V], by autograd."""
    size = logits.shape[1]
    each = logits[:, None].repeat(1, size, 1).requires_grad_()
    log_probs = each.log_softmax(-1).diagonal(dim1=1, dim2=2)
    loss = -((log_probs - old_log_probs).exp() * advantages).sum()
    return -torch.autograd.grad(loss, each)[0]


def assert_changes(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_each_score_is_its_formula(size):
    logits = logits_of(size)
    given = arguments(logits)
    scores, old, A, mask = given
    p = softmax(logits.numpy(), axis=1)
    H = -np.sum(p * np.log(p), axis=1, keepdims=True)
    S = p * (H + np.log(p))
    D = S - np.sum(p * S, axis=1, keepdims=True)
    A, old = A.numpy(), np.exp(old.numpy())
    wanted = {"entropy": np.broadcast_to(H, p.shape), "surprisal": -np.log(p), "s": S, "d": D, "first_order": A * D,
              "covariance": (A - A.mean()) * (np.log(p) - np.log(p).mean()),
              "steer": A / old * p * (1 - p) * (np.log(p) + H),
              "repo": A * (np.log(p) - np.sum(p * np.log(p), axis=1, keepdims=True)),
              "quadrant": np.where(p > np.exp(-H), 1, -1) * np.sign(A)}
    assert set(wanted) == set(SCORES)
    for name, values in wanted.items():
        found = SCORES[name](*given).numpy()
        # Of the uniform distribution, p is e^{−H} but for rounding, so that its quadrants are rounding's.
        rows = slice(1, None) if name == "quadrant" else slice(None)
        np.testing.assert_allclose(found[rows], values[rows], rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("size", (2, 3, 7, 40))
def test_what_each_score_is_the_change_of(size):
    """The four steps of the docstrings, made and measured."""
    logits = logits_of(size)
    scores, old, A, mask = given = arguments(logits)
    p, each = logits.softmax(-1), logits[:, None].repeat(1, size, 1)
    e, ratio = torch.eye(size, dtype=torch.float64), (scores.log_probs - old).exp()

    def score(name):
        return SCORES[name](*given)

    assert_changes(change(each, e.expand_as(each)), -score("s"))
    assert_changes(change(each, e - p[:, None]), -score("d"))
    step = steps(logits, old, A)
    torch.testing.assert_close(step, (ratio * A)[..., None] * (e - p[:, None]), atol=1e-13, rtol=1e-12)
    assert_changes(change(each, step), -ratio * score("first_order"))
    # STEER's theorem: what the sampled token's own logit does; Ω is 1/p times that.
    own = change(each, step * e)
    assert_changes(own, -ratio * A * (p * (1 - p) * (p.log() + scores.entropies)))
    assert_changes(own, -p * score("steer"))
    # REPO: the natural gradient, with the softmax's Fisher matrix.
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    natural = torch.einsum("nij,nkj->nki", torch.linalg.pinv(fisher, rtol=1e-14), A[..., None] * (e - p[:, None]))
    tame = p.amin(1) > 1e-4
    assert tame.sum() > 3
    assert_changes(change(each, natural)[tame], -score("repo")[tame])
    assert_changes(change(each, A[..., None] * e / p[..., None])[tame], -score("repo")[tame])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_where_the_claimed_signs_are_right(size, seed):
    """H + log p has the right sign about a policy-gradient step but for e^{−H} < p < p*."""
    logits = logits_of(size, seed)[1:].requires_grad_()
    (gradient,) = torch.autograd.grad(entropy_of(logits).sum(), logits)
    logits = logits.detach()
    scores, _, A, mask = arguments(logits)
    given = scores, scores.log_probs, A, mask
    p, H = logits.softmax(-1), scores.entropies
    # A step on log p_k adds e_k − p to the logits.
    lowers = -A * (gradient - (p * gradient).sum(1, keepdim=True))
    exact = SCORES["first_order"](*given)
    assert_changes(exact, lowers)
    assert torch.equal(exact.sign(), lowers.sign())

    mean = (p * SCORES["s"](*given)).sum(1, keepdim=True)
    assert (mean > 0).all()
    boundary = torch.from_numpy(-H.numpy() + lambertw((H.exp() * mean).numpy()).real).exp()
    assert (boundary > (-H).exp()).all()
    assert torch.equal(SCORES["d"](*given) > 0, p > boundary)
    wrong = ((-H).exp() < p) & (p < boundary)
    assert size == 3 or bool(wrong.any()) == (size > 3)
    assert (exact / A)[wrong].abs().le(mean.expand_as(p)[wrong]).all()
    for name in ("quadrant", "steer", "repo"):
        assert torch.equal(SCORES[name](*given).sign() != exact.sign(), wrong)
    assert torch.equal((A * SCORES["s"](*given)).sign() != exact.sign(), wrong)
    # Every unlikely token is judged rightly, and one likely one is in every distribution.
    assert not wrong[p < (-H).exp()].any()
    assert ((p > boundary).any(1)).all()
    # The covariance: two comparisons, of A with its mean and of log p with its mean, right or wrong together.
    of_p = (p.log() > p.log().mean()) == (p > boundary)
    of_A = (A > A.mean()) == (A > 0)
    assert torch.equal(SCORES["covariance"](*given).sign() == exact.sign(), of_p == of_A)


def test_three_tokens_are_enough_for_a_wrong_sign():
    """Of p = 0.5, 0.4, 0.1, e^{−H} is 0.389: the second token is likely, and pushing it up raises the entropy."""
    logits = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64).log()
    scores, _, _, mask = arguments(logits)
    given = scores, scores.log_probs, torch.ones(1), mask
    assert SCORES["quadrant"](*given).tolist() == [[1, 1, -1]]
    assert SCORES["d"](*given).sign().tolist() == [[1, -1, -1]]
    assert entropy_of(logits + 0.01 * (torch.eye(3)[1] - logits.exp())) > entropy_of(logits)


@pytest.mark.parametrize("size", SIZES)
def test_means_under_the_policy(size):
    logits = logits_of(size)
    scores, old, A, mask = arguments(logits)
    p = logits.softmax(-1)
    A = A - (p * A).sum(1, keepdim=True)

    def mean(name):
        return (p * SCORES[name](scores, old, A, mask)).sum(1)

    assert mean("d").abs().max() < 1e-13
    # The tabular policy gradient and the natural one, of J = Σ p A.
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((z.softmax(-1) * A).sum(), z)
    assert_changes(change(logits, gradient), -mean("first_order"))
    assert_changes(change(logits, A), -mean("repo"))


def test_the_covariance_of_one_state_is_its_natural_gradients_change():
    """With tokens as frequent as they are probable, means over tokens are means under p."""
    counts = torch.tensor([5, 1, 3, 1, 2])
    logits = (counts.double() / 12).log()[None]
    tokens = torch.arange(5).repeat_interleave(counts)
    everything = every_token(logits)
    scores = dh.TokenScores(*(x[:, tokens] for x in everything))
    A = torch.tensor([[0.7, -1.0, 0.3, 2.0, -0.5]], dtype=torch.float64)
    found = SCORES["covariance"](scores, scores.log_probs, A[:, tokens], torch.ones(1, 12, dtype=torch.bool))
    assert_changes(change(logits, A), -found.mean(1))


def test_outside_the_mask_anything_may_stand_and_nothing_comes_out():
    scores, old, A, _ = arguments(logits_of(7))
    mask = torch.rand(8, 7, generator=torch.Generator().manual_seed(2)) < 0.7
    names = ("log_probs", "entropies", "collisions", "collision_log_probs")
    zeros = [torch.where(mask, x, 0.0) for x in (*(getattr(scores, name) for name in names), old, A)]
    for name, function in SCORES.items():
        wanted = function(dh.TokenScores(*zeros[:4]), *zeros[4:], mask)
        for garbage in (math.nan, math.inf, -1e30):
            *fields, other, weights = (torch.where(mask, x, garbage).requires_grad_() for x in zeros)
            found = function(dh.TokenScores(*fields), other, weights, mask)
            assert torch.equal(found, wanted) and not found.requires_grad, name
        assert not found[~mask].any() and found[mask].any(), name
    kept = torch.tensor([[True, False]])
    two = dh.TokenScores(*(x[:1, :2] for x in scores))
    assert SCORES["covariance"](two, old[:1, :2], A[:1, :2], kept).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", SCORES)
def test_dtypes_and_advantages_of_whole_responses(name):
    scores, old, A, mask = arguments(logits_of(7))
    one = A[:, 0]
    wide = SCORES[name](scores, old, one[:, None].expand_as(mask), mask)
    assert wide.dtype == torch.float64 and torch.equal(SCORES[name](scores, old, one, mask), wide)
    names = ("log_probs", "entropies", "collisions", "collision_log_probs")
    single = [getattr(scores, field).float() for field in names] + [old.float(), one.float()]
    found = SCORES[name](dh.TokenScores(*single[:4]), *single[4:], mask)
    double = [x.double() for x in single]
    # What is in between is in float64.
    assert found.dtype == torch.float32
    assert torch.equal(found, SCORES[name](dh.TokenScores(*double[:4]), *double[4:], mask).float())
    # The uniform distribution's quadrants are rounding's.
    torch.testing.assert_close(found[1:].double(), wide[1:], atol=3e-6, rtol=3e-6)


def test_d_from_float32_is_exact_to_float32s_rounding_even_of_a_nearly_certain_token():
    logits = logits_of(1000).float()
    logits[:, 0] = torch.linspace(3, 80, 8)
    exact = SCORES["d"](every := every_token(logits.double()), every.log_probs, torch.ones(8), torch.ones(8, 1000) > 0)
    scores = every_token(logits)
    found = SCORES["d"](scores, scores.log_probs, torch.ones(8), torch.ones(8, 1000) > 0)
    assert every.entropies.min() < 1e-9
    assert (found - exact).abs().max() < 1e-6


def test_on_a_policys_own_scores():
    policy = dh.exact.tiny_policy(vocabulary_size=6)
    every = dh.exact.every_response(policy, [[0], [1, 2]], max_new_tokens=1)
    with torch.no_grad():
        scores = dh.score(policy, every, moments=True)
    values = {name: function(scores, scores.log_probs, torch.arange(12.0) - 3, every.response_mask)
              for name, function in SCORES.items()}
    assert all(x.shape == (12, 1) and torch.isfinite(x).all() for x in values.values())
    assert (scores.log_probs.exp() * values["d"]).view(2, 6).sum(1).abs().max() < 1e-15
    assert (values["first_order"][3] == 0).all() and values["first_order"].unique().numel() > 10


@pytest.mark.parametrize("name", SCORES)
def test_bad_arguments_are_named(name):
    scores, old, A, mask = arguments(logits_of(3))
    function = SCORES[name]
    for wrong, error, message in (
            ((tuple(scores), old, A, mask), TypeError, "^scores: expected a TokenScores, got tuple"),
            ((dh.TokenScores(scores.log_probs[:2], *scores[1:], *[scores.collisions] * 2), old, A, mask), ValueError,
             r"^scores.log_probs: expected the mask's shape \[8, 3\], got \[2, 3\]"),
            ((scores, old[:, :2], A, mask), ValueError, r"^old_log_probs: expected the mask's shape"),
            ((scores, old, A[:, :2], mask), ValueError, r"^advantages: expected shape \[8\] or \[8, 3\]"),
            ((scores, old, A * math.nan, mask), ValueError, "^advantages: expected finite numbers inside the mask"),
            ((scores, old * math.inf, A, mask), ValueError, "^old_log_probs: expected finite numbers inside the mask"),
            ((scores, old, A, mask.double()), TypeError, "^mask: expected booleans"),
            ((scores, old, A, mask[0]), ValueError, r"^mask: expected shape \[N, T\], got \[3\]")):
        with pytest.raises(error, match=message):
            function(*wrong)
    without = dh.TokenScores(*scores)
    if name in ("d", "first_order"):
        with pytest.raises(ValueError, match=r"^scores: expected moments, which score\(..., moments=True\) gives"):
            function(without, old, A, mask)
        broken = dh.TokenScores(*scores, scores.collisions / 0, scores.collision_log_probs)
        with pytest.raises(ValueError, match="^scores.collisions: expected finite numbers inside the mask"):
            function(broken, old, A, mask)
    else:
        assert torch.equal(function(without, old, A, mask), function(scores, old, A, mask))
