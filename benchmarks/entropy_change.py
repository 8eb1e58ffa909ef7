"""What predicting the entropy change costs, against one forward and backward pass over the same batch.

All sides take turns within one run, so that whatever slows the machine slows them all; ratios are of medians. Memory is
measured on a model of 38 million parameters with few tokens, where vectors of the size of the parameters are most of
it: the peak of the process above what it held before, over the size of the parameters.

Targets: first order at most 1.5 times, second order at most 5 times a forward and backward pass; at most four
parameter-sized vectors, the direction included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen2Config

import deltah as dh

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"first order": 1.5, "second order": 5.0, "memory, first order": 4.0, "memory, second order": 4.0}


def random_rollouts(policy: dh.Policy, count: int, prompt: int, response: int) -> dh.Rollouts:
    """Rollouts of random tokens, none of them padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, policy.vocabulary_size, (count, prompt + response), generator=generator)
    return dh.Rollouts(input_ids, torch.ones_like(input_ids, dtype=torch.bool),
                       torch.ones(count, response, dtype=torch.bool), torch.arange(count)).to(policy.device)


def random_direction(policy: dh.Policy) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 1e-3 * torch.randn(p.shape, generator=generator).to(p) for name, p in policy.parameters.items()}


def forward_and_backward(policy: dh.Policy, rollouts: dh.Rollouts) -> None:
    """What a training step costs at the least: the model's own log-probs of the responses, and their gradient."""
    start = rollouts.prompt_length - 1
    logits = policy.model(input_ids=rollouts.input_ids).logits[:, start:-1]
    total = logits.log_softmax(-1).gather(-1, rollouts.response_ids[..., None]).sum()
    torch.autograd.grad(total, list(policy.parameters.values()))


def times(policy: dh.Policy, rollouts: dh.Rollouts, rounds: int) -> dict[str, list[float]]:
    v = random_direction(policy)
    sides = {"forward and backward": lambda: forward_and_backward(policy, rollouts)}
    for order, name in ((1, "first order"), (2, "second order")):
        sides[name] = lambda order=order: dh.entropy_change(policy, rollouts, v, order)
    taken = {name: [] for name in sides}
    for _ in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in taken.items()}


def peak_vectors(order: int) -> float:
    """Peak memory of `entropy_change` above the model's, the direction included, in vectors of the parameters' size."""
    config = Qwen2Config(vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=5,
                         num_attention_heads=12, num_key_value_heads=4)
    policy = dh.Policy(AutoModelForCausalLM.from_config(config))
    size = sum(p.numel() * p.element_size() for p in policy.parameters.values())
    rollouts = random_rollouts(policy, count=5, prompt=4, response=4)
    # Both buffers of the libraries and the allocator's are there before the count begins.
    with torch.no_grad():
        dh.score(policy, rollouts)
    before = _status("VmRSS")
    v = random_direction(policy)
    Path("/proc/self/clear_refs").write_text("5")
    dh.entropy_change(policy, rollouts, v, order)
    # θ is held as well: one.
    return 1 + (_status("VmHWM") - before) / size


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "data/policy"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    policy = dh.load_policy(options.model, options.device)
    taken = times(policy, random_rollouts(policy, options.rollouts, prompt=32, response=64), options.rounds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    base = medians["forward and backward"]
    ratios = {name: median / base for name, median in medians.items()}
    if Path("/proc/self/clear_refs").exists():
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = pool.map(peak_vectors, (1, 2), chunksize=1)
        ratios |= {"memory, first order": peaks[0], "memory, second order": peaks[1]}

    lines = [f"{options.rollouts} rollouts of 32 + 64 tokens, {sum(p.numel() for p in policy.parameters.values()):,} "
             f"parameters, {policy.device.type}, {torch.get_num_threads()} threads, {options.rounds} rounds", "",
             "| side | seconds | ratio | target |", "|---|---|---|---|"]
    for name, ratio in ratios.items():
        seconds = f"{medians[name]:.3f}" if name in medians else ""
        unit = " vectors" if name not in medians else ""
        target = f"≤ {TARGETS[name]:g}" + ("" if ratio <= TARGETS[name] else " MISSED") if name in TARGETS else ""
        lines.append(f"| {name} | {seconds} | {ratio:.2f}{unit} | {target} |")
    text = "\n".join(lines)
    print(text)
    results = ROOT / "results" / "bench"
    results.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps({"ratios": ratios, "seconds": taken}, indent=1)
    for suffix, content in ((".md", text + "\n"), (".json", numbers)):
        partial = results / f".entropy_change{suffix}.partial"
        partial.write_text(content)
        os.replace(partial, results / f"entropy_change{suffix}")


if __name__ == "__main__":
    main()
