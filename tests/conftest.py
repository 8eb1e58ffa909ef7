"""What several tests share: the shipped policy, and tiny random models of several architectures."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

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

WIDE = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
# Biases of the output layer, factors and soft caps, x W^T written out, convolutions, offsets, ALiBi, windows, sinks.
MORE = {
    "gpt_neox": lambda v: GPTNeoXConfig(vocab_size=v, **WIDE),
    "opt": lambda v: OPTConfig(vocab_size=v, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                             max_position_embeddings=128, word_embed_proj_dim=32),
    "falcon": lambda v: FalconConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "phi": lambda v: PhiConfig(vocab_size=v, **SMALL),
    "gemma2": lambda v: Gemma2Config(vocab_size=v, head_dim=8, sliding_window=4, **SMALL),
    "gemma3": lambda v: Gemma3TextConfig(vocab_size=v, head_dim=8, sliding_window=4,
                                       layer_types=["sliding_attention", "full_attention"], **SMALL),
    "mistral": lambda v: MistralConfig(vocab_size=v, head_dim=8, sliding_window=4, **SMALL),
    "granite": lambda v: GraniteConfig(vocab_size=v, logits_scaling=3.0, residual_multiplier=0.7, **SMALL),
    "cohere": lambda v: CohereConfig(vocab_size=v, use_qk_norm=True, **SMALL),
    "olmo2": lambda v: Olmo2Config(vocab_size=v, **SMALL),
    "gptj": lambda v: GPTJConfig(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "mixtral": lambda v: MixtralConfig(vocab_size=v, num_local_experts=4, **SMALL),
    "gpt_oss": lambda v: GptOssConfig(vocab_size=v, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **SMALL),
    "lfm2": lambda v: Lfm2Config(vocab_size=v, layer_types=["conv", "full_attention"], **SMALL),
    "nemotron": lambda v: NemotronConfig(vocab_size=v, head_dim=8, **SMALL),
    "starcoder2": lambda v: Starcoder2Config(vocab_size=v, **SMALL),
    "stablelm": lambda v: StableLmConfig(vocab_size=v, **SMALL),
    "mpt": lambda v: MptConfig(vocab_size=v, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "bloom": lambda v: BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4),
}


def build_model(architecture, vocabulary_size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = (CONFIGS | MORE)[architecture](vocabulary_size)
    if architecture in MORE:
        # Defaults that do not fit a small vocabulary.
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform, so that a wrong position or mask shows.
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.to(dtype).eval()


def random_rollouts(size, count, prompt, response, seed=0, temperature=1.3):
    """Random tokens, of all lengths, padded on both sides; two to a prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (count, prompt + response), generator=generator)
    prompts = torch.arange(prompt) >= torch.arange(count)[:, None] % prompt
    lengths = torch.randint(1, response + 1, (count, 1), generator=generator)
    lengths[0] = response
    responses = torch.arange(response) < lengths
    return dh.Rollouts(ids, torch.cat([prompts, responses], 1), responses, torch.arange(count) // 2,
                       temperature=temperature)


class StraightThrough(torch.autograd.Function):
    """In one piece, with a derivative of its own for forward mode too."""

    @staticmethod
    def forward(x):
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


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
