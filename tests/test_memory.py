"""How many rollouts run at a time: what is free, what a sequence takes, and that results do not depend on it."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import deltah as dh
from conftest import CONFIGS, MORE, build_model, random_rollouts
from deltah import dynamics, memory
from deltah.derivatives import sample_gradients, taylor
from deltah.sampling import resample
from deltah.scoring import batches

V = 37
NAMES = sorted({*CONFIGS, *MORE})
# Of measured bytes, what the estimate is at least and at most, over the architectures of the tests.
LEAST, MOST = 0.9, 3.6


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


V1 = {"memory.limit_in_bytes": "1000\n", "memory.usage_in_bytes": "700\n",
      "memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 90\n"}
V2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 90\n"}


@pytest.mark.parametrize("lines, mount, files", [
    ("3:cpu:/x\n2:memory:/box/job\n0::/y\n", "sys/fs/cgroup/memory", V1),
    ("2:cpuacct,memory:/box/job\n", "sys/fs/cgroup/memory", V1),
    ("0::/box/job\n", "sys/fs/cgroup", V2),
    ("2:cpu:/\n0::/box/job\n", "sys/fs/cgroup/unified", V2)])
@pytest.mark.parametrize("folder", ["box/job", "box", ""])
def test_limits_of_control_groups_and_of_those_around_them(tmp_path, lines, mount, files, folder):
    """The root is what a container sees of its own group."""
    write(tmp_path, {"proc/self/cgroup": lines} | {f"{mount}/{folder}/{name}": text for name, text in files.items()})
    assert list(memory._left_in_cgroups(tmp_path)) == [390]


def test_the_tightest_limit_counts_and_none_is_none(tmp_path):
    assert list(memory._left_in_cgroups(tmp_path)) == []
    write(tmp_path, {"proc/self/cgroup": "0::/box/job\n"} | {
        f"sys/fs/cgroup/box/{name}": text for name, text in V2.items()} | {
        f"sys/fs/cgroup/box/job/{name}": text for name, text in (V2 | {"memory.max": "max\n"}).items()})
    assert list(memory._left_in_cgroups(tmp_path)) == [390]
    write(tmp_path, {"sys/fs/cgroup/box/job/memory.max": "600\n"})
    assert sorted(memory._left_in_cgroups(tmp_path)) == [0, 390]


def test_free_memory_of_the_processor(monkeypatch):
    available = memory.psutil.virtual_memory().available
    assert 0 < memory.free(torch.device("cpu")) < 2 * available
    monkeypatch.setattr(memory, "_left_in_cgroups", lambda root: iter([available // 1000, 10**18]))
    assert memory.free(torch.device("cpu")) == available // 1000


def test_free_memory_of_a_gpu_counts_what_pytorch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert memory.free(torch.device("cuda", 0)) == 1200


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, but for those given."""

    def __init__(self, apart):
        super().__init__()
        self.apart, self.sizes, self.live, self.peak = {x.untyped_storage()._cdata for x in apart}, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, taylor.Jet) for kind in types):
            # It calls again, with its coefficients.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, taylor.Jet):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key not in self.apart and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key):
        self.live -= self.sizes.pop(key)


def full_rollouts(count, length, size=V):
    ids = torch.randint(1, size, (count, length), generator=torch.Generator().manual_seed(0))
    return dh.Rollouts(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(count, 8, dtype=torch.bool),
                       torch.arange(count))


def saved_bytes(policy, rollouts):
    apart = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in apart:
            saved[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dh.score(policy, rollouts, batch_size=len(rollouts))
    return sum(storage.nbytes() for storage in saved.values())


def random_direction(policy):
    generator = torch.Generator().manual_seed(1)
    return {name: 1e-2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in policy.parameters.items()}


def live_bytes(policy, rollouts, order):
    v = random_direction(policy)
    with torch.no_grad(), Live([*policy.model.parameters(), *v.values()]) as live:
        if order:
            # Without the fingerprints of an entropy change, which take a megabyte whatever the model.
            dynamics._derivatives(policy, rollouts, v, order, "none", len(rollouts))
        else:
            dh.score(policy, rollouts, batch_size=len(rollouts))
    return live.peak


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_near_what_tensors_take(name):
    policy = dh.Policy(build_model(name, V))
    for length in (16, 64):
        rollouts = full_rollouts(4, length)
        measured = {("backward", 0): saved_bytes(policy, rollouts), ("forward", 0): live_bytes(policy, rollouts, 0)}
        if name != "bloom":
            measured |= {("series", order): live_bytes(policy, rollouts, order) for order in (1, 2)}
        for (kind, order), bytes_ in measured.items():
            ratio = 4 * memory.sequence_bytes(policy, length, kind, order) / bytes_
            assert LEAST < ratio < MOST, f"{kind} {order} of {length} tokens: {ratio:.2f}"


def test_nested_forward_mode_takes_no_more_than_the_estimate(monkeypatch):
    def refuse(*_):
        raise taylor.Refused("no rule")

    monkeypatch.setattr(taylor, "_by_jets", refuse)
    policy = dh.Policy(build_model("llama", V))
    for order in (1, 2):
        measured = live_bytes(policy, full_rollouts(4, 64), order)
        assert 4 * memory.sequence_bytes(policy, 64, "series", order) > LEAST * measured


def large_policy(**changes):
    """Of a shape where much is at stake; its parameters take no memory."""
    config = dict(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=20,
                  num_attention_heads=8, num_key_value_heads=8)
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**config | changes))


class Described:
    """What the estimate needs to know of a policy."""

    dtype, device, vocabulary_size, has_linear_output = torch.float32, torch.device("cpu"), 1000, True

    def __init__(self, model):
        self.model = model


def test_rows_count_the_prompt_and_what_is_free(monkeypatch):
    policy = Described(large_policy())
    monkeypatch.setattr(memory, "free", lambda device: 2**40)
    # As many as are fast.
    assert memory.rows_at_once(policy, 100, "forward") == memory.WIDEST_ON_CPU // (2048 * 100)
    assert memory.rows_at_once(policy, 100, "series", order=2) == memory.WIDEST_ON_CPU // (3 * 2048 * 100)
    assert memory.rows_at_once(policy, 100, "sampling", logits=1) == memory.WIDEST_ON_CPU // 1000
    # As many as fit.
    for kind, length in (("backward", 100), ("backward", 400), ("sampling", 100)):
        one = memory.sequence_bytes(policy, length, kind)
        monkeypatch.setattr(memory, "free", lambda device, one=one: 4 * 3 * one + 400)
        assert memory.rows_at_once(policy, length, kind) == 3
        assert memory.rows_at_once(policy, length, kind, share=0.4) == 1
        assert memory.rows_at_once(policy, length, kind, held=one + 100) == 2
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert memory.rows_at_once(policy, 400, "backward") == 1


def test_gradients_have_their_part_of_the_budget(monkeypatch):
    """That of a batch, and the sum of those before it, beside two graphs."""
    policy, rollouts = dh.Policy(build_model("llama", V)), full_rollouts(6, 16)
    needed = 2 * 4 * sum(p.numel() for p in policy.parameters.values()) + 2.5 * memory.sequence_bytes(
        policy, 16, "backward")
    monkeypatch.setattr(memory, "free", lambda device: needed / memory.SHARE)
    assert [len(rows) for rows in batches(policy, rollouts)] == [2, 2, 2]
    assert len(batches(policy, rollouts, kind="forward")) == 1


def test_a_score_with_gradients_is_a_backward_pass(monkeypatch):
    kinds, policy = [], dh.Policy(build_model("llama", V))
    monkeypatch.setattr(memory, "rows_at_once", lambda policy, length, kind, *_, **__: kinds.append(kind) or 8)
    dh.score(policy, full_rollouts(2, 16))
    with torch.no_grad():
        dh.score(policy, full_rollouts(2, 16))
    assert kinds == ["backward", "forward"]


def test_eager_attention_keeps_its_weights():
    fused, eager = (Described(large_policy(attn_implementation=name)) for name in ("sdpa", "eager"))
    more = memory.sequence_bytes(eager, 1000, "backward") - memory.sequence_bytes(fused, 1000, "backward")
    weights = 20 * 8 * 1000**2 * 4
    assert 2 * weights < more < 5 * weights


def results(policy, rollouts, v):
    """Of every function that divides its rollouts into batches."""
    sgd = torch.optim.SGD(policy.parameters.values(), lr=0.1)
    direction = dh.update_direction(policy, rollouts.replace(advantages=torch.arange(len(rollouts)) - 2.0),
                                    optimizer=sgd)
    first = dh.entropy_change(policy, rollouts, direction)
    with torch.no_grad():
        found = [*dh.score(policy, rollouts)]
    steps = torch.rand(len(rollouts), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coupled = dh.measured_entropy_change(policy, rollouts, v, [0.1], method="coupled", seed=1)
    weighted = dh.measured_entropy_change(policy, rollouts, v, [1e-3])
    return [*found, first.contributions, dh.entropy_change(policy, rollouts, v, order=2).contributions,
            *direction.vector.values(), dh.attribution(policy, rollouts, direction, first).tokens,
            dh.fisher_kernel(policy, rollouts), dh.fisher_kernel(policy, rollouts, rollouts.select(slice(3))),
            dh.fisher_kernel(policy, rollouts, preconditioner={n: x.abs() for n, x in v.items()}),
            dh.fisher_sketch(policy, rollouts, 64), resample(policy, rollouts, rollouts.lengths, steps).input_ids,
            torch.tensor(coupled.change[0]), torch.tensor(weighted.change[0])]


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_results_do_not_depend_on_the_budget(name, monkeypatch):
    policy = dh.Policy(build_model(name, V, torch.float64))
    rollouts = random_rollouts(V, 6, 5, 6)
    v, expected, sizes = random_direction(policy), None, []
    watched = memory.rows_at_once

    def rows_at_once(*args, **kwargs):
        sizes.append(watched(*args, **kwargs))
        return sizes[-1]

    monkeypatch.setattr(memory, "rows_at_once", rows_at_once)
    # Room for one rollout at a time, for a few, for all.
    for free in (0, 16 * memory.sequence_bytes(policy, 11, "backward"), 2**40):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        sizes.clear()
        found = results(policy, rollouts, v)
        assert (set(sizes) == {1}) == (free == 0)
        expected = expected or found
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_samples_do_not_depend_on_the_budget(random_policy, monkeypatch):
    whole = dh.sample(random_policy, ["Ava has 3 eggs.", "2"], 3, max_new_tokens=6)
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert torch.equal(dh.sample(random_policy, ["Ava has 3 eggs.", "2"], 3, max_new_tokens=6).input_ids,
                       whole.input_ids)


def test_a_callers_batch_size_overrides_the_budget(random_policy, monkeypatch):
    rollouts = random_rollouts(random_policy.vocabulary_size, 6, 4, 5).replace(rewards=torch.arange(6) / 5)
    v = {name: torch.ones_like(p) for name, p in random_policy.parameters.items()}
    sizes, output = [], dh.Policy.output

    def watched(self, input_ids, *args):
        sizes.append(len(input_ids))
        return output(self, input_ids, *args)

    monkeypatch.setattr(dh.Policy, "output", watched)
    monkeypatch.setattr(memory, "free", lambda device: 0)
    sgd = torch.optim.SGD(random_policy.parameters.values(), lr=0.1)
    for call in (lambda: dh.score(random_policy, rollouts, batch_size=4),
                 lambda: dh.update_direction(random_policy, rollouts, optimizer=sgd, batch_size=4),
                 lambda: dh.entropy_change(random_policy, rollouts, v, batch_size=4)):
        sizes.clear()
        call()
        assert set(sizes) == {4, 2}


def test_unusual_parameters_are_taken_in_groups(monkeypatch):
    """As many as the budget allows, beside a single one."""
    policy, rollouts, groups = dh.Policy(build_model("gpt_oss", V, torch.float64)), random_rollouts(V, 3, 5, 6), []
    original = sample_gradients._one_by_one
    monkeypatch.setattr(sample_gradients, "_one_by_one",
                        lambda p, r, names: (groups.append(names), original(p, r, names))[1])
    kernels = []
    for free, count in ((2**40, 1), (0, 2)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        groups.clear()
        sample_gradients.sample_gradients(policy, rollouts, lambda gradient: None, keep=0)
        assert len(groups) == count
        kernels.append(dh.fisher_kernel(policy, rollouts))
    torch.testing.assert_close(*kernels, atol=1e-9, rtol=1e-9)
