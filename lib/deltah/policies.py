"""A policy: a transformers causal language model, its tokenizer, and the parameters that may change."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltah.modes import forward_mode
from deltah.output_layers import OutputLayer, find_scaling, watched_output
from deltah.vocabulary import Scaling

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Policy:
    """Wraps any transformers causal language model as a distribution over responses.

    The model is put into evaluation mode: dropout would make log-probs random.

    Args:
        model: a transformers causal LM, on the device and in the dtype that it is to run in.
        tokenizer: its tokenizer; None for a policy that is only ever given token ids.

    Attributes:
        parameters: dict of the trainable parameters by name; tied ones appear once.
        eos_token_ids: the tokens that end a response, from the tokenizer and the generation config.
        context_length: the longest sequence that the model takes; None where it has no limit.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: `model` cannot produce logits, or `tokenizer` has no end-of-sequence token.

    >>> policy = Policy(model, tokenizer)                                    # doctest: +SKIP
    >>> policy.logits(input_ids, keep=4).shape                               # doctest: +SKIP
    torch.Size([2, 4, 434])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a transformers causal LM, got {type(model).__name__}")
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: expected a causal LM with an output layer, got {type(model).__name__}")
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: has no end-of-sequence token, so no response would ever end; "
                             "set tokenizer.eos_token to one of its tokens")
        self.model = model.eval()
        if self.dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
            # The grouped matrix product of mixtures of experts has no float64.
            model.set_experts_implementation("eager")
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.vocabulary_size: int = config.vocab_size
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_token_ids = _eos_token_ids(model, tokenizer, self.vocabulary_size)
        self._accepts = inspect.signature(model.forward).parameters

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def logits(self, input_ids: Tensor, keep: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Next-token logits at the last `keep` positions.

        Args:
            input_ids: [N, L] token ids, padded on the right if at all: a causal model does not look there.
            keep: how many of the last positions to return logits for.
            parameters: values to use in place of the model's own, by name; they may carry gradients or
                tangents. None: the model's own.

        Returns:
            [N, keep, V] in the model's dtype.
        """
        return self.run_keeping(keep, {"input_ids": input_ids, "use_cache": False}, parameters).logits[:, -keep:]

    def output(self, input_ids: Tensor, keep: int,
               parameters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, OutputLayer | None, Tensor | None]:
        """As `logits`, but before the output layer where that is a linear one.

        Returns:
            (hidden states [N, keep, d] that the output layer is given, the output layer, None), and where it is not
            linear, or the model does more to its logits than scale or soft-cap them, (hidden states, None, logits).
        """
        if self._scaling is None:
            with watched_output(self.model) as seen:
                logits = self.logits(input_ids, keep, parameters)
            return seen[0][0][:, -keep:], None, logits
        with watched_output(self.model, lambda x: x.new_zeros(*x.shape[:-1], 1)) as seen:
            self.logits(input_ids, keep, parameters)
        hidden, weight, bias = seen[0]
        return hidden[:, -keep:], OutputLayer(weight, bias, self._scaling), None

    @property
    def has_linear_output(self) -> bool:
        """Whether `output` gives hidden states and an output layer, so that logits need not be made."""
        return self._scaling is not None

    @functools.cached_property
    def _scaling(self) -> Scaling | None:
        return find_scaling(self.model, self.vocabulary_size, lambda ids: self.logits(ids, 1))

    def run(self, arguments: Mapping[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for keyword `arguments`, with `parameters` in place of its own where given."""
        if parameters is None:
            return self.model(**arguments)
        return torch.func.functional_call(self.model, dict(parameters), (), dict(arguments))

    def run_keeping(self, keep: int, arguments: Mapping[str, Any],
                    parameters: Mapping[str, Tensor] | None = None) -> Any:
        """`run`, with logits at the last `keep` positions alone where the model can do without the others."""
        length = arguments["input_ids"].shape[1]
        if "logits_to_keep" in self._accepts:
            return self.run({**arguments, "logits_to_keep": keep}, parameters)
        if length <= keep or not self.has_linear_output:
            return self.run(arguments, parameters)
        forward = self.model.get_output_embeddings().forward
        # Scaled and capped at most, each position's logits depend on its own hidden state.
        with watched_output(self.model, lambda h: forward(h[:, -keep:] if h.shape[1:-1] == (length,) else h)):
            return self.run(arguments, parameters)

    @contextlib.contextmanager
    def forward_mode(self) -> Iterator[None]:
        """Inside, `torch.func.jvp` of the logits is right to any order; on leaving, the model is as it was."""
        with forward_mode(self.model):
            yield

    def shifted(self, direction: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
        """The parameters θ + step · v, for `score(..., parameters=...)`; the model's own stay as they are.

        Args:
            direction: v, by name, of the parameters' shapes; those it leaves out stay where they are.
            step: the step size η.

        Raises:
            ValueError: a name that is not a trainable parameter's, a shape that differs, or a part not finite.
        """
        self.check(direction)
        return {name: (p.detach() + step * direction[name]).to(p.dtype) if name in direction else p.detach()
                for name, p in self.parameters.items()}

    def check(self, tensors: Mapping[str, Tensor], argument: str = "direction") -> None:
        """Raise ValueError where tensors by name, such as a direction, have a part that no trainable parameter has."""
        own = self.parameters
        for name, v in tensors.items():
            if name not in own or v.shape != own[name].shape:
                expected = f"shape {list(own[name].shape)}" if name in own else "the name of a trainable parameter"
                raise ValueError(f"{argument}[{name!r}]: expected {expected}, got {name!r} of shape {list(v.shape)}")
            if not torch.isfinite(v).all():
                raise ValueError(f"{argument}[{name!r}]: expected finite numbers, got NaN or infinity")

    def generation_arguments(self, attention_mask: Tensor, **arguments: Any) -> dict[str, Any]:
        """Keyword arguments for the model with a cache: positions count tokens, so that left padding shifts nothing."""
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if "position_ids" in self._accepts:
            arguments["position_ids"] = positions[:, -arguments["input_ids"].shape[1]:]
        return {"attention_mask": attention_mask.long(), "use_cache": True, **arguments}

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, special tokens included.

        Raises:
            ValueError: no prompts, an empty one, or a policy without a tokenizer.
            TypeError: a prompt that is not a string.
        """
        if self.tokenizer is None:
            raise ValueError("policy: has no tokenizer to read prompts with; pass one to Policy(model, tokenizer)")
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a list of strings, got a single string")
        prompts = list(prompts)
        if not prompts:
            raise ValueError("prompts: expected at least one prompt, got none")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{i}]: expected a string, got {type(prompt).__name__}")
        encoded = self.tokenizer(prompts)["input_ids"]
        for i, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"prompts[{i}]: expected some text, got {prompts[i]!r}, which has no tokens")
        return encoded

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """The text of each row's tokens where `mask` [N, T] is True, special tokens left out."""
        rows = [row[kept].tolist() for row, kept in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, size: int) -> tuple[int, ...]:
    sources = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    found = {tokenizer.eos_token_id} if tokenizer is not None else set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    # A default of the config class may lie outside a small vocabulary.
    return tuple(sorted(i for i in found if i is not None and 0 <= i < size))


def load_policy(path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "float32") -> Policy:
    """Load a policy from a folder or from the Hugging Face hub; safetensors only, no remote code.

    Args:
        path: a folder written by `save_pretrained`, or a hub id such as "Qwen/Qwen2.5-0.5B".
        device: "cpu", "cuda", "cuda:1", ..., or "auto": CUDA where there is any, else the CPU.
        dtype: "float32", "float64" or "bfloat16".

    Raises:
        ValueError: no loadable model there, weights that are damaged or missing, a tokenizer without an
            end-of-sequence token, or a device or dtype that does not exist.

    >>> load_policy("data/policy").vocabulary_size                           # doctest: +SKIP
    434
    """
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {str(dtype)!r}")
    dtype = DTYPES[str(dtype).removeprefix("torch.")]
    device = _find_device(device)
    expected = "expected a folder with config.json, model.safetensors and a tokenizer, or a hub id"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # transformers raises a dozen types here; each means that nothing was loaded
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"path: could not load a policy from {str(path)!r}; {expected} ({reason})") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"path: the weights in {str(path)!r} lack {len(report['missing_keys'])} tensors of the model, "
                         f"such as {missing}")
    return Policy(model.to(device), tokenizer)


def _find_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        expected = "expected 'auto', 'cpu' or an available 'cuda' device"
        raise ValueError(f"device: {expected}, got {str(device)!r}") from error
    return found
