import math

import pytest
import torch
import torch.nn.functional as F

import deltah as dh
from conftest import CONFIGS, MORE, StraightThrough, build_model, random_rollouts
from deltah import vocabulary
from deltah.derivatives import jets, taylor
from deltah.scoring import score_batch
from test_updates import low_rank_policy, peft_policy

V = 37


def build(name):
    """In float64 throughout, with attention written out."""
    return dh.exact.exact_policy(build_model(name, V))


def rollouts_for(count=3, prompt=4, response=5, seed=0, size=V):
    return random_rollouts(size, count, prompt, response, seed)


def random_direction(policy, only="", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.1
            for name, p in policy.parameters.items() if only in name}


def by(how, policy, rollouts, v, order=2):
    """Values and derivatives by jets, or by forward mode of the scores as they are, and nested."""
    theta = {name: p.detach() for name, p in policy.parameters.items()}
    with policy.forward_mode(), torch.enable_grad():
        return how(lambda moved: score_batch(policy, rollouts, theta | moved), {name: theta[name] for name in v}, v,
                   order)


def assert_same(found, expected, tolerance=1e-9):
    """The hidden states among them, where both have them."""
    assert len(found) == len(expected)
    for order, (xs, ys) in enumerate(zip(found, expected, strict=True)):
        for x, y in zip(xs, ys, strict=True):
            assert type(x) is torch.Tensor and x.dtype == y.dtype
            scale = float(y.abs().max()) or 1.0
            error = float((x - y).abs().max()) / scale
            assert error < tolerance, f"order {order}: relative error {error:.1e}"


def assert_backward_passes_agree(found, policy, rollouts, v):
    """Random sums over the tokens of the log-probs, and of the entropies, against two backward passes each."""
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    theta = {name: p.detach() + eta * v[name] if name in v else p.detach() for name, p in policy.parameters.items()}
    with policy.forward_mode(), torch.enable_grad():
        for i, x in enumerate(score_batch(policy, rollouts, theta)[0]):
            weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
            first, = torch.autograd.grad((weights * x).sum(), eta, create_graph=True)
            second, = torch.autograd.grad(first, eta, retain_graph=True)
            for order, expected in ((1, first), (2, second)):
                terms = weights * found[order][i]
                scale = float(terms.abs().sum())
                assert float(terms.sum()) == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-9 * scale)


@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE}))
def test_real_models_take_the_fast_path_and_are_exact(name):
    policy, rollouts = build(name), rollouts_for()
    v = random_direction(policy)
    found = by(taylor._by_jets, policy, rollouts, v)
    if name != "bloom":
        # Its custom function has no forward mode.
        assert_same(found, by(taylor._by_forward_mode, policy, rollouts, v))
    assert_same(by(taylor._by_jets, policy, rollouts, v, order=1), [*found[:2], found[3]])
    assert_backward_passes_agree(found, policy, rollouts, v)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "mistral", "gpt_neox", "phi"])
def test_fused_attention(name):
    """Also with heads that share keys, and windows."""
    policy, rollouts = build(name), rollouts_for()
    policy.model.set_attn_implementation("sdpa")
    v = random_direction(policy)
    for order in (1, 2):
        assert_same(by(taylor._by_jets, policy, rollouts, v, order),
                    by(taylor._by_forward_mode, policy, rollouts, v, order))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen3_moe", "lfm2", "phi", "gemma2"])
def test_some_parameters_move(name):
    policy, rollouts, seen = build(name), rollouts_for(), 0
    for only in ("bias", "norm", "ln_", "layers.1", "h.1", "embed", "wte", "wpe", "lm_head", "lm_head.bias",
                 "experts", "conv", "gate"):
        v = random_direction(policy, only)
        if v:
            # What experts write into is not known to move where nothing before them does.
            how = taylor.derivatives_along if only in ("experts", "gate") else taylor._by_jets
            found = by(how, policy, rollouts, v)
            assert any(x.any() for x in found[1])
            assert_same(found, by(taylor._by_forward_mode, policy, rollouts, v))
            assert_same(by(how, policy, rollouts, v, order=1), [*found[:2], found[3]])
            seen += 1
    assert seen >= 3


def test_adapters():
    policy = low_rank_policy(V)
    policy = dh.exact.exact_policy(policy.model)
    v, rollouts = random_direction(policy), rollouts_for()
    assert len(v) == 8
    found = by(taylor._by_jets, policy, rollouts, v)
    assert_same(found, by(taylor._by_forward_mode, policy, rollouts, v))
    assert_backward_passes_agree(found, policy, rollouts, v)


def test_what_has_no_forward_mode_says_so():
    policy, rollouts = build("llama"), rollouts_for()
    layer = policy.model.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: torch.fake_quantize_per_tensor_affine(forward(x).float(), 0.1, 0, -128, 127).double()
    v = random_direction(policy)
    with pytest.raises(jets.Refused):
        by(taylor._by_jets, policy, rollouts, v)
    with pytest.raises(RuntimeError, match="forward AD"):
        by(taylor.derivatives_along, policy, rollouts, v)


class Hidden(StraightThrough):
    """Twice the cube, with derivatives of its own that are not those of the cube."""

    @staticmethod
    def forward(x):
        return 2 * x**3


class Identity(Hidden):
    @staticmethod
    def forward(x):
        return x.view_as(x)


class OfOld(torch.autograd.Function):
    """In the older style, which forward mode refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without_grad(x):
    with torch.no_grad():
        # Operations with rules of their own, the general rule, and a write.
        return F.mish((x * 2).sin_()) + x.softmax(-1)


def with_grad(x):
    return F.mish((x * 2).sin()) + x.softmax(-1)


def written(x):
    """Into views, of what has been computed from it as well."""
    y = x * 2
    half = y[..., :16]
    z = half.sin()
    half.mul_(z).add_(x[..., 16:])
    y[:, 0] = x[:, 1]
    y[..., 3:5] *= y[..., 5:7]
    return y.clone().masked_fill_(x > 1, 0.3) + F.pad(z, (0, 16))


def collected(x):
    """From rows written into a tensor made for them."""
    out = torch.zeros_like(x)
    rows = torch.tensor([0, 2])
    out.index_add_(1, rows, x[:, rows] ** 3)
    out[:, 1] = x[:, 1].exp()
    out[:, 3:].copy_(x[:, 3:])
    return out


def attended(x):
    """With masks of every kind, one that leaves a row nothing, heads that share keys, and a mask that moves."""
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)
    k, steps = q[:, ::2], x.shape[1]
    mask = torch.ones(steps, steps, dtype=torch.bool).tril()
    call = F.scaled_dot_product_attention
    out = (call(q, k, k, is_causal=True, enable_gqa=True) + call(q, k, 2 * k, mask, scale=0.3, enable_gqa=True)
           + call(q, q, q, mask & (torch.arange(steps) > 0)) + call(q, q, q, q @ q.mT)
           + call(q, q, q, torch.randn(steps, steps, dtype=x.dtype, generator=torch.Generator().manual_seed(0)))
           + call(q.flatten(0, 1), q.flatten(0, 1), q.flatten(0, 1)).view(q.shape))
    return x + out.transpose(1, 2).flatten(-2)


def swapped(x):
    y = x * 1
    y.data = x * 2
    return y


def transposed(x):
    y = x.clone()
    seen = y.view(-1)
    y.transpose_(1, 2)
    return seen.view(x.shape) + y.transpose(1, 2)


# Functions of hidden states [n, T, 32], in all that models do with them.
PLAIN = {
    "attention": attended,
    "written": written,
    "collected": collected,
    "in place": lambda x: x.clone().mul_(2).add_(1).pow_(3).neg_(),
    "norms": lambda x: F.rms_norm(x, (32,)) + F.normalize(x, dim=-1) + F.layer_norm(x, (32,)) + x.norm(),
    "means": lambda x: x - x.mean() + x.var(-1, keepdim=True) + x.logsumexp(-1, keepdim=True),
    "divided": lambda x: x / (2 + x.square()) + 3 / (2 + x.abs()) - (x / 3) + torch.div(x, 2.0) + (1 - x),
    "functions": (lambda x: F.silu(x) + F.gelu(x) * F.gelu(x, approximate="tanh") + x.tanh() * x.sigmoid().exp()
                  + F.relu(x) * F.softplus(x) + F.elu(x).sin() * (x * x + 1).rsqrt() + F.hardtanh(x) + x**3 * 2**x
                  + F.relu(x).square() + F.leaky_relu(x) + F.mish(x) + (x * x + 1) ** -0.5 + x.erf() + x.cos()),
    "softmaxes": lambda x: x.softmax(-1) + x.log_softmax(1) + F.softmax(x, 0, dtype=torch.float64),
    "largest": (lambda x: (x.topk(3, -1).values.sum(-1, keepdim=True) + x.sort(-1, descending=True).values
                           + x.max(-1, keepdim=True).values * x.min(1).values[:, None] + x.amax(-1, keepdim=True)
                           + torch.maximum(x, -x) + x.clamp(-1, 0.5))),
    "rearranged": (lambda x: torch.cat([x[..., 16:], -x[..., :16]], -1) + x.flip(-1) * x.roll(1, 0) + x.cumsum(1)
                   + torch.stack([x, x * x]).sum(0) + x.repeat(1, 1, 2)[..., 5:37] + x.unfold(-1, 4, 4).reshape(x.shape)
                   + torch.where(x > 0, x, 0.1 * x) + torch.where(x > 0, 1.0, x) + x.tril() + x.chunk(2, -1)[1].tile(2)
                   + x.index_select(2, torch.arange(31, -1, -1)) + x.repeat_interleave(2, -1)[..., ::2]
                   + x.masked_fill(x > 1, 0.3) + F.pad(x, (1, 0), value=2.0)[..., 1:] + x.float().double() + 1),
    "added products": (lambda x: torch.baddbmm(x, x @ x.mT, x.sin(), beta=0.3, alpha=0.7)
                       + torch.zeros(1, 1, 1).double().baddbmm(x @ x.mT, x) + x.baddbmm(x @ x.mT, x)),
    "products": (lambda x: torch.einsum("nti,nsi->nts", x, x) @ x / 32 + (x @ x[0, :1].mT) + x[0, 0].dot(x[1, 1]) * x
                 + torch.outer(x[0, 0], x[0, 1])[:1] + x.matmul(x[1, 2])[..., None] + torch.addcmul(x, x, x.sin())
                 + torch.lerp(x, x.sin(), 0.3)),
    "convolved": lambda x: F.conv1d(x.mT, x[:1, :1, :3].expand(32, 1, 3) * 1, x[0, 0], padding=1, groups=32).mT,
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2)))
                                             * torch.polar(torch.ones(16), torch.arange(16.0)).to(torch.complex128)
                                             ).flatten(-2)),
}
# Functions that hide what they do from backward passes or from forward mode; who differentiates them, "jets", "forward"
# or nobody; and the function that runs, where a backward pass sees another.
SPECIAL = {
    "custom function": (Hidden.apply, "jets", lambda x: 2 * x**3),
    "custom identity": (Identity.apply, "jets", lambda x: 1 * x),
    "custom function of old": (OfOld.apply, "jets", lambda x: 2 * x**3),
    "no grad": (lambda x: x + without_grad(x), "jets", lambda x: x + with_grad(x)),
    "detach": (lambda x: x * x.detach() + x.data * torch.detach(x).sin(), "jets", lambda x: x * x + x * x.sin()),
    "detached norm": (lambda x: x * (x[0, 0] / x.norm(dim=-1, keepdim=True).detach()), "jets",
                      lambda x: x * (x[0, 0] / x.norm(dim=-1, keepdim=True))),
    "inference mode": (lambda x: x + torch.inference_mode()(torch.erf)(x).clone(), "jets", lambda x: x + x.erf()),
    "copied": (lambda x: x * torch.tensor(x), "jets", lambda x: x * x),
    "copied to its like": (lambda x: x * x.new_tensor(x), "jets", lambda x: x * x),
    "written after detach": (lambda x: x + x.detach().mul_(2), "jets", lambda x: 4 * x),
    "straight through": (StraightThrough.apply, "nobody", None),
    "straight through by detach": (lambda x: x + ((4 * x).round() / 4 - x).detach(), "nobody", None),
    "straight through without grad": (lambda x: x + torch.no_grad()(torch.round)(x) * 0.1, "nobody", None),
    "integers": (lambda x: (4 * x).to(torch.int8).to(x.dtype) / 4, "nobody", None),
    "signs": (lambda x: x + torch.sign(x), "nobody", None),
    "floors": (lambda x: x + torch.div(x, 0.1, rounding_mode="floor"), "nobody", None),
    "in steps": (lambda x: x + x.clone().floor_() + x // 0.1, "nobody", None),
    "fake quantised": (lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double(), "nobody",
                       None),
    "number": (lambda x: x * float(x.max()), "nobody", None),
    "list": (lambda x: x * torch.tensor(x[0, 0].tolist(), dtype=x.dtype), "nobody", None),
    "outside PyTorch": (lambda x: x + torch.from_numpy(x.detach().numpy()), "nobody", None),
    "data replaced": (swapped, "nobody", None),
    "random": (lambda x: x * torch.bernoulli(x.sigmoid()), "forward", None),
    "plain buffer": (lambda x: torch.zeros(x.shape).double().index_add_(1, torch.tensor([0]), x[:, :1]) + x, "forward",
                     None),
    "turned in place": (transposed, "forward", None),
}
CALLS = SPECIAL | {kind: (function, "jets", None) for kind, function in PLAIN.items()}


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_whatever_a_model_calls(kind):
    """The derivative of the function that runs, or none."""
    function, who, same = CALLS[kind]
    policy, rollouts = build("llama"), rollouts_for()
    assert policy.has_linear_output
    layer = policy.model.model.layers[0].mlp.down_proj
    forward, v = layer.forward, random_direction(policy)

    def calling(function, how, order=2):
        layer.forward = lambda x: function(forward(x))
        torch.manual_seed(0)
        return by(how, policy, rollouts, v, order)

    if who != "jets":
        for order in (1, 2):
            with pytest.raises((jets.Refused, RuntimeError)):
                calling(function, taylor._by_jets, order)
            if who == "nobody":
                with pytest.raises((jets.Refused, RuntimeError)):
                    calling(function, taylor.derivatives_along, order)
    if who == "nobody":
        return
    found = calling(function, taylor.derivatives_along)
    assert_same(calling(function, taylor.derivatives_along, order=1), [*found[:2], found[3]])
    if who == "jets":
        assert_same(calling(function, taylor._by_jets), found)
        try:
            # Forward mode may refuse, but not answer otherwise.
            assert_same(calling(function, taylor._by_forward_mode), found)
        except (jets.Refused, RuntimeError):
            assert same is not None
    if kind not in ("written", "random"):
        # The first a backward pass does not allow, the second is another one each time.
        layer.forward = lambda x: (same or function)(forward(x))
        assert_backward_passes_agree(found, policy, rollouts, v)
    if same is not None:
        assert_same(found, calling(same, taylor._by_forward_mode))


def finite_differences(policy, rollouts, v, step):
    """Of log-probs and entropies along v, of both orders, to step²."""
    with torch.no_grad():
        below, here, above = (dh.score(policy, rollouts, policy.shifted(v, h)) for h in (-step, 0.0, step))
    return [[(c - a) / (2 * step) for a, c in zip(below, above, strict=True)],
            [(c - 2 * b + a) / step**2 for a, b, c in zip(below, here, above, strict=True)]]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("how", [taylor._by_jets, taylor._by_forward_mode])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_of_peft_against_finite_differences(dora, how, kind):
    """DoRA detaches the norm of its weights, which moves with them."""
    policy, rollouts = peft_policy(kind, V, dora), rollouts_for()
    v = random_direction(policy)
    assert v and all("lora" in name for name in v) and dora == any("magnitude" in name for name in v)
    found = by(how, policy, rollouts, v)
    for order, expected in enumerate(finite_differences(policy, rollouts, v, 1e-4), start=1):
        for x, y in zip(found[order], expected, strict=True):
            assert float((x - y).abs().max()) < 1e-6 * float(y.abs().max())
    if not dora:
        assert_backward_passes_agree(found, policy, rollouts, v)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("tile", [2**20, 60])
def test_vocabulary_in_tiles(bias, soft_cap, tile, monkeypatch):
    monkeypatch.setattr(vocabulary, "TILE_ON_CPU", tile)
    monkeypatch.setattr(vocabulary, "ROWS_ON_CPU", 4)
    torch.manual_seed(0)
    shapes = {"h": (2, 5, 8), "w": (50, 8), "b": (50,)}
    theta, v = ({name: torch.randn(s, dtype=torch.float64) for name, s in shapes.items()} for _ in range(2))
    theta["b"][7] = -math.inf
    targets = torch.randint(8, 50, (2, 5))

    def function(p):
        h, w, b = p["h"].sin(), p["w"].sin(), p["b"] if bias else None
        return dh.linear_log_probs_and_entropies(h, w, targets, 1.3, b, 0.7, soft_cap), h

    for order in (1, 2):
        assert_same(taylor._by_jets(function, theta, v, order),
                    taylor._by_forward_mode(function, theta, v, order), 1e-12)


def test_float32_and_bfloat16(shipped):
    rollouts = rollouts_for(count=4, response=12, size=434)
    exact = dh.exact.exact_policy(dh.load_policy(shipped.model.config._name_or_path, "cpu").model)
    v = random_direction(exact)
    expected = [[x.float() for x in order] for order in by(taylor._by_jets, exact, rollouts, v)[:3]]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        policy = dh.load_policy(shipped.model.config._name_or_path, "cpu", dtype)
        moved = {name: x.to(dtype) for name, x in v.items()}
        *found, _ = by(taylor._by_jets, policy, rollouts, moved)
        assert_same(found, expected, tolerance)


def test_the_model_is_left_as_it_was(shipped):
    rollouts = rollouts_for(count=2, size=434)
    before = {name: p.clone() for name, p in shipped.model.state_dict().items()}
    v = random_direction(shipped)
    kept = {name: x.clone() for name, x in v.items()}
    *_, hidden = by(taylor.derivatives_along, shipped, rollouts, v)
    assert type(hidden) is torch.Tensor and not hidden.requires_grad
    assert all(torch.equal(before[name], p) for name, p in shipped.model.state_dict().items())
    assert all(torch.equal(kept[name], x) for name, x in v.items())
