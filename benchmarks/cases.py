"""What the sides work on: a model, random or from a folder, and rollouts of random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import deltah as dh

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "data" / "policy"


@dataclass(frozen=True)
class Case:
    """One size of a problem. `width` None: the model in the folder `model`, or of that hub id; else a random one."""

    rollouts: int = 64
    prompt: int = 32
    response: int = 64
    width: int | None = None
    intermediate: int | None = None
    layers: int = 4
    vocabulary: int = 434
    model: str = str(SHIPPED)
    device: str = "cpu"

    @property
    def parameters(self) -> int:
        """How many a random model has; without layers, those of an output layer."""
        if not self.layers:
            return self.width * self.vocabulary
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self._config()).num_parameters()

    def _config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.intermediate or 3 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=max(2, self.width // 64), num_key_value_heads=2,
            tie_word_embeddings=True)

    def policy(self) -> dh.Policy:
        if self.width is None:
            return dh.load_policy(self.model, self.device)
        torch.manual_seed(0)
        return dh.Policy(AutoModelForCausalLM.from_config(self._config()).to(self.device),
                         AutoTokenizer.from_pretrained(SHIPPED))

    def random_rollouts(self, policy: dh.Policy) -> dh.Rollouts:
        """Rollouts of random tokens, none of them padding: token 0, whose embedding has no gradient, is left out."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.rollouts, self.prompt + self.response)
        input_ids = torch.randint(1, policy.vocabulary_size, shape, generator=generator)
        return dh.Rollouts(input_ids, torch.ones_like(input_ids, dtype=torch.bool),
                           torch.ones(self.rollouts, self.response, dtype=torch.bool),
                           torch.arange(self.rollouts)).to(policy.device)

    def describe(self) -> str:
        prompt = f"{self.prompt} + " if self.prompt else ""
        lengths = f"{self.rollouts} rollouts of {prompt}{self.response} tokens"
        if self.width is None:
            path = Path(self.model)
            return f"{lengths}, the model {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}"
        if not self.layers:
            return f"{lengths}, an output layer of width {self.width} and vocabulary {self.vocabulary:,}"
        return f"{lengths}, a random model of width {self.width}, {self.layers} layers, vocabulary {self.vocabulary:,}"


# What grows, by label: the field of the case, and its values.
AXES = {"rollouts": ("rollouts", (8, 16, 32, 64)), "length, tokens": ("response", (32, 96, 224)),
        "parameters": ("width", (128, 256, 512)), "vocabulary": ("vocabulary", (434, 4_096, 16_384))}
# Where growth starts from.
SMALL = Case(rollouts=16, width=128)
# Qwen2.5-0.5B's shape.
HALF_BILLION = Case(width=896, intermediate=4864, layers=24, vocabulary=151_936, device="cuda")


def random_direction(policy: dh.Policy) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 1e-3 * torch.randn(p.shape, generator=generator).to(p) for name, p in policy.parameters.items()}


def response_log_probs(policy: dh.Policy, rollouts: dh.Rollouts) -> torch.Tensor:
    """Log-probs [N, T] of the responses, as a training loop would write them."""
    logits = policy.model(input_ids=rollouts.input_ids, use_cache=False).logits[:, rollouts.prompt_length - 1:-1]
    return logits.log_softmax(-1).gather(-1, rollouts.response_ids[..., None])[..., 0]


def forward_and_backward(policy: dh.Policy, rollouts: dh.Rollouts) -> None:
    """What a training step costs at the least: the log-probs of the responses, and the gradient of their sum."""
    torch.autograd.grad(response_log_probs(policy, rollouts).sum(), list(policy.parameters.values()))
