"""A training run in a process of its own, which a test kills."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import deltah as dh

ROOT = Path(__file__).resolve().parent.parent


def digits(texts, rows):
    return [sum(c.isdigit() for c in text) / 4 for text in texts]


def run(folder):
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    problems = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(40)]})
    dh.training.train(dh.Policy(model, tokenizer), problems, steps=8, prompts_per_step=6, responses_per_prompt=4,
                      minibatches=2, learning_rate=3e-3, max_new_tokens=8, reward=digits, predict_every=3,
                      predict_prompts=6, checkpoint=Path(folder) / "run.safetensors", checkpoint_every=1)
