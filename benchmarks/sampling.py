"""Sampling: responses of a policy to prompts, against transformers' own `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from cases import AXES, HALF_BILLION, ROOT, SMALL, Case
from side_by_side import Section, Sides, Target

import deltah as dh

GENERATE = "model.generate"
RESPONSES = 8


def prompts(case: Case) -> list[str]:
    """One for every eight rollouts."""
    problems = dh.load_problems(ROOT / "data" / "problems", "test")["prompt"]
    return [problems[i % len(problems)] for i in range(max(1, case.rollouts // RESPONSES))]


def sides(case: Case) -> Sides:
    policy, texts = case.policy(), prompts(case)
    # Every run draws anew: lengths differ from draw to draw, and time with them.
    seeds = {name: itertools.count() for name in ("deltah", GENERATE)}

    def ours() -> dh.Rollouts:
        return dh.sample(policy, texts, RESPONSES, case.response, temperature=1.0, seed=next(seeds["deltah"]))

    def generate() -> dh.Rollouts:
        torch.manual_seed(next(seeds[GENERATE]))
        rows = policy.encode(texts)
        width = max(map(len, rows))
        input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=policy.device)
        attention = torch.tensor([[i >= width - len(row) for i in range(width)] for row in rows], device=policy.device)
        tokens = policy.model.generate(
            input_ids=input_ids, attention_mask=attention.long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=RESPONSES, max_new_tokens=case.response, eos_token_id=list(policy.eos_token_ids),
            pad_token_id=policy.eos_token_ids[0])
        attention = attention.repeat_interleave(RESPONSES, 0)
        ended = torch.isin(tokens[:, width:], torch.tensor(policy.eos_token_ids, device=policy.device))
        # A response holds its first end, and nothing after it.
        mask = ended.cumsum(1) - ended.long() == 0
        index = torch.arange(len(texts), device=policy.device).repeat_interleave(RESPONSES)
        return dh.Rollouts(tokens, torch.cat([attention, mask], 1), mask, index)

    return {"deltah": ours, GENERATE: generate}


def differences(case: Case, results: Mapping[str, dh.Rollouts]) -> dict[str, float]:
    """Of the mean log-prob of a response and of its mean length, in standard errors of the difference."""
    if GENERATE not in results:
        return {}
    policy, found = case.policy(), {}
    with torch.no_grad():
        samples = {name: torch.stack([dh.score(policy, r).log_probs.sum(1).double(), r.lengths.double()]).cpu()
                   for name, r in results.items()}
    for name, sample in samples.items():
        # Rows stand for the same prompt on both sides.
        means = [dh.Estimate.mean(x) for x in sample - samples[GENERATE]]
        found[name] = max(abs(m.value) / m.standard_error if m.value else 0.0 for m in means)
    return found


def thousands(result: dh.Rollouts) -> float:
    """Thousands of tokens, through each response's end."""
    return float(result.lengths.sum()) / 1000


def section(title: str, case: Case, growth: Case | None) -> Section:
    return Section(
        title=title, about=f"{RESPONSES} responses to each prompt, at temperature 1, until EOS or to full length; a "
                           "response's tokens count through its EOS. The draws differ, the distribution is to be the "
                           "same: mean log-prob and mean length of the responses are compared.",
        sides=sides, base=GENERATE, case=case, cuda=replace(HALF_BILLION, rollouts=256, prompt=0),
        tiny=Case(rollouts=32, prompt=0, response=6, width=32, layers=2),
        targets=(Target("deltah", GENERATE, 1.0, "time per token"),),
        differences=differences, tolerance=4.0, difference_unit="standard errors", units=thousands,
        unit="seconds per 1,000 tokens", growth=growth,
        axes=AXES | {"rollouts": ("rollouts", (32, 128, 512)), "length, tokens": ("response", (16, 64, 128))})


SECTIONS = {
    "shipped": section("The shipped policy", Case(rollouts=256, prompt=0), None),
    "random": section("Random models", Case(rollouts=64, prompt=0, width=768), replace(SMALL, rollouts=64, prompt=0))}
