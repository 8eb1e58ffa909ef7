"""What several tests share: the shipped policy, and tiny random models of several architectures."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

import deltah as dh

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)
CONFIGS = {
    "qwen2": lambda v: Qwen2Config(vocab_size=v, tie_word_embeddings=True, **SMALL),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, **SMALL),
    "llama": lambda v: LlamaConfig(vocab_size=v, bos_token_id=None, eos_token_id=None, **SMALL),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "qwen3_moe": lambda v: Qwen3MoeConfig(vocab_size=v, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=16, **SMALL),
}


def build_model(architecture, vocabulary_size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](vocabulary_size))
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform, so that a wrong position or mask shows.
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.to(dtype)


@pytest.fixture(scope="session")
def shipped():
    return dh.load_policy(ROOT / "data" / "policy", device="cpu")


@pytest.fixture(scope="session")
def problems():
    return dh.load_problems(ROOT / "data" / "problems", "test")


@pytest.fixture(params=sorted(CONFIGS))
def random_policy(request, shipped):
    """A tiny random policy of each architecture, with the shipped tokenizer."""
    return dh.Policy(build_model(request.param, shipped.vocabulary_size), shipped.tokenizer)
