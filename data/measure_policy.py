"""Print the figures of the data card: how the shipped policy does on the shipped test split.

    python data/measure_policy.py [policy] [problems]
"""

import sys
from pathlib import Path

import torch

import deltah as dh

HERE = Path(__file__).parent


def main(policy_path: Path, problems_path: Path) -> None:
    policy, problems = dh.load_policy(policy_path), dh.load_problems(problems_path, "test")
    rollouts = dh.sample(policy, problems, responses_per_prompt=8, max_new_tokens=96, batch_size=1024)
    with torch.no_grad():
        entropies = dh.score(policy, rollouts).entropies
    lengths = rollouts.lengths.float()
    solved = rollouts.rewards.view(len(problems), 8)
    ended = torch.isin(rollouts.response_ids, torch.tensor(policy.eos_token_ids, device=policy.device)).any(1)
    share = lengths.std() / lengths.mean()
    print(f"parameters               {sum(p.numel() for p in policy.parameters.values()):,}")
    print(f"pass@1                   {dh.Estimate.mean(rollouts.rewards, rollouts.prompt_index)}")
    print(f"pass@8                   {dh.Estimate.mean(solved.amax(1))}")
    print(f"entropy per token, nats  {float(entropies.sum() / rollouts.response_mask.sum()):.3f}")
    print(f"response length, tokens  mean {lengths.mean():.1f}, standard deviation {lengths.std():.1f} ({share:.0%})")
    print(f"longer than 64 tokens    {(lengths > 64).float().mean():.2%}")
    print(f"cut at 96 tokens         {(~ended).float().mean():.2%}")


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    main(*paths, *[HERE / "policy", HERE / "problems"][len(paths):])
