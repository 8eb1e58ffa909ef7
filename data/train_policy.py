"""Train the shipped policy from scratch on the stream of problems: what `make policy` does.

    python data/train_policy.py [folder]

A byte-level BPE tokenizer and a Qwen2 model of 0.85 million parameters. Training stops when held-out pass@1
says so, well before the model can do everything: a policy for reinforcement learning must have something to learn.
"""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from make_problems import SEED, generate, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import deltah as dh

log = logging.getLogger("train_policy")
END = "<|endoftext|>"
VOCABULARY, BATCH, STEPS, WARMUP, PEAK = 512, 64, 4000, 100, 2e-3
# Held-out pass@1 at which the learning rate starts to fall, and for how many steps it falls.
ENOUGH, COOLDOWN = 0.30, 150
EVALUATE_EVERY, EVALUATE_ON = 50, 256


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text encodes, every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (f"{problem['question']}\n{problem['answer']}" for problem in islice(generate(SEED + 1), 20_000))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Qwen2ForCausalLM(config)


def training_batches(tokenizer: PreTrainedTokenizerFast, excluded: set[str]) -> Iterator[dict[str, Tensor]]:
    """Endless right-padded batches; the loss is on the answers only."""
    stream = (p for p in generate(SEED + 2) if p["question"] not in excluded)
    while True:
        rows = []
        for problem in islice(stream, BATCH):
            prompt = tokenizer.encode(problem["question"] + "\n")
            answer = tokenizer.encode(problem["answer"]) + [tokenizer.eos_token_id]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        width = max(len(ids) for ids, _ in rows)
        yield {
            "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])}


def pass_at_1(policy: dh.Policy, problems: Dataset) -> float:
    return float(dh.sample(policy, problems, responses_per_prompt=1, max_new_tokens=80).rewards.mean())


def train(folder: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    policy = dh.Policy(build_model(tokenizer), tokenizer)
    _, test = split()
    excluded = {problem["question"] for problem in test}
    held_out = [p for p in islice(generate(SEED + 3), 2 * EVALUATE_ON) if p["question"] not in excluded][:EVALUATE_ON]
    held_out = Dataset.from_dict({"prompt": [p["question"] + "\n" for p in held_out],
                                  "answer": [p["answer"] for p in held_out]})
    log.info("%s parameters", f"{sum(p.numel() for p in policy.parameters.values()):,}")

    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    remaining = COOLDOWN + 1
    batches = training_batches(tokenizer, excluded)
    for step in tqdm(range(1, STEPS + 1), desc="train", unit="step"):
        if remaining <= COOLDOWN:
            remaining -= 1
        optimizer.param_groups[0]["lr"] = PEAK * min(step / WARMUP, remaining / COOLDOWN, 1.0)
        if remaining == 0:
            break
        loss = policy.model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters.values(), 1.0)
        optimizer.step()
        if step % EVALUATE_EVERY == 0:
            rate = pass_at_1(policy, held_out)
            log.info("step %d: loss %.3f, held-out pass@1 %.2f", step, loss.item(), rate)
            if rate >= ENOUGH and remaining > COOLDOWN:
                remaining = COOLDOWN
    _save(policy, folder)


def _save(policy: dh.Policy, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.model.save_pretrained(partial)
    policy.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    log.info("wrote %s", folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "policy")
