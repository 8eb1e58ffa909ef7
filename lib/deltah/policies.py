"""A policy: a transformers causal language model, its tokenizer, and the parameters that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltah import checks
from deltah.models.causal_lm import accepts, check_causal_lm, eos_token_ids, unwrapped
from deltah.models.modes import evaluation, forward_mode, held
from deltah.models.output_layers import OutputLayer, linear_output, watched_output
from deltah.models.prompts import Prompt, encode

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Policy:
    """Wraps any transformers causal language model as a distribution over responses.

    Whatever runs the model runs it in evaluation mode, as dropout would make log-probs random, and leaves it in the
    mode that it found. The constructor changes nothing either. Threads that share a model take turns.

    Args:
        model: a transformers causal LM, on the device and in the dtype that it is to run in; or PEFT's wrapper around
            one, of adapters that are part of its layers, such as LoRA.
        tokenizer: its tokenizer; None for a policy that is only ever given token ids.

    Attributes:
        model: the transformers model, without PEFT's wrapper.
        parameters: dict of the trainable parameters by name; tied ones appear once.
        vocabulary_size: V.
        eos_token_ids: the tokens that end a response, from the tokenizer and the generation config.
        context_length: the longest sequence that the model takes; None where it has no limit.
        has_linear_output: whether `output` could do without logits the last time.

    Raises:
        TypeError: `model` is not a transformers model, or `tokenizer` not a transformers tokenizer.
        ValueError: a model that is not causal or cannot produce logits, a PEFT wrapper that does more than run it, or
            an end-of-sequence token that is missing or outside the vocabulary.

    >>> policy = Policy(model, tokenizer)                                    # doctest: +SKIP
    >>> policy.logits(input_ids, keep=4).shape                               # doctest: +SKIP
    torch.Size([2, 4, 434])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        if tokenizer is not None:
            checks.instance("tokenizer", tokenizer, PreTrainedTokenizerBase, "a transformers tokenizer")
        self.model, self.tokenizer = unwrapped(model), tokenizer
        check_causal_lm(self.model)
        eos_token_ids(self.model, tokenizer)
        self.has_linear_output = self._finds_linear_output()

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        # Not those that another thread has put in for a while.
        with held(self.model):
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return eos_token_ids(self.model, self.tokenizer)

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

        Raises:
            TypeError or ValueError: no token ids of that shape, `keep` outside [1, L], or unknown parameters.
        """
        keep = _kept(input_ids, keep)
        return self.run_keeping(keep, {"input_ids": input_ids, "use_cache": False}, parameters).logits[:, -keep:]

    def output(self, input_ids: Tensor, keep: int,
               parameters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, OutputLayer | None, Tensor | None]:
        """As `logits`, but before the output layer where that is a linear one.

        A model that needs its logits runs twice the first time, and from then on one token more.

        Returns:
            (hidden states [N, keep, d] that the output layer is given, the output layer, None), and where it is not
            linear, or the model does more to its logits than scale or soft-cap them, (hidden states, None, logits).
        """
        keep = _kept(input_ids, keep)
        with evaluation(self.model):
            if not self.has_linear_output:
                self.has_linear_output = self._finds_linear_output()
            if self.has_linear_output:
                found = self._linear_output(input_ids, keep, parameters)
                if found is not None:
                    return found[0][:, -keep:], found[1], None
                self.has_linear_output = False
            with watched_output(self.model) as seen:
                logits = self.logits(input_ids, keep, parameters)
            return seen[0][0][:, -keep:], None, logits

    def _linear_output(self, input_ids: Tensor, keep: int = 1, parameters: Mapping[str, Tensor] | None = None
                       ) -> tuple[Tensor, OutputLayer] | None:
        arguments = {"input_ids": input_ids, "use_cache": False}
        if accepts(type(self.model), "logits_to_keep"):
            arguments["logits_to_keep"] = keep
        with evaluation(self.model):
            return linear_output(self.model, lambda: self.run(arguments, parameters).logits)

    def _finds_linear_output(self) -> bool:
        with torch.no_grad():
            return self._linear_output(torch.zeros(1, 1, dtype=torch.long, device=self.device)) is not None

    def run(self, arguments: Mapping[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for keyword `arguments`, with `parameters` in place of its own where given."""
        with evaluation(self.model):
            if parameters is None:
                return self.model(**arguments)
            _check_parameters(self.model, parameters)
            return torch.func.functional_call(self.model, dict(parameters), (), dict(arguments))

    def run_keeping(self, keep: int, arguments: Mapping[str, Any],
                    parameters: Mapping[str, Tensor] | None = None) -> Any:
        """`run`, with logits at the last `keep` positions alone where the model can do without the others."""
        length = arguments["input_ids"].shape[1]
        if accepts(type(self.model), "logits_to_keep"):
            return self.run({**arguments, "logits_to_keep": keep}, parameters)
        if length <= keep or not self.has_linear_output:
            return self.run(arguments, parameters)
        with evaluation(self.model):
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
            TypeError: `direction` is no dict of tensors, or `step` no number.
            ValueError: a name that is not a trainable parameter's, a shape that differs, or a part not finite.
        """
        check_tensors(self, direction)
        step = checks.number("step", step)
        return {name: (p.detach() + step * direction[name]).to(p.dtype) if name in direction else p.detach()
                for name, p in self.parameters.items()}

    def encode(self, prompts: Iterable[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, special tokens included.

        Args:
            prompts: texts, which are tokenized as they stand (but for a second beginning-of-sequence token, which is
                left out), or lists of messages {"role", "content"}, for which the tokenizer's chat template is used:
                it asks for an answer after the last message, and continues that where it is the assistant's.

        Raises:
            ValueError: no prompts, an empty one, messages that the template does not take or for which there is none,
                or a policy without a tokenizer.
            TypeError: a prompt that is neither text nor a list of messages.

        >>> policy.encode(["2+2=", [{"role": "user", "content": "2+2?"}]])       # doctest: +SKIP
        [[18, 11, 18, 29], [0, 18, 11, 18, 31, 1]]
        """
        if self.tokenizer is None:
            raise ValueError("policy: has no tokenizer to read prompts with; pass one to Policy(model, tokenizer)")
        return encode(self.tokenizer, prompts)

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """The text of each row's tokens [N, T] where `mask` [N, T] is True, special tokens left out.

        Raises:
            ValueError: a policy without a tokenizer, or shapes that differ.
            TypeError: something else than integers and booleans.

        >>> policy.decode(rollouts.response_ids, rollouts.response_mask)         # doctest: +SKIP
        ['4\\n#### 4']
        """
        if self.tokenizer is None:
            raise ValueError("policy: has no tokenizer to write texts with; pass one to Policy(model, tokenizer)")
        checks.tensor("tokens", tokens, ("N", "T"), "integer")
        checks.tensor("mask", mask, tuple(tokens.shape), "boolean")
        rows = [row[kept].tolist() for row, kept in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def check_tensors(policy: Policy, tensors: Mapping[str, Tensor], argument: str = "direction") -> None:
    """Raise ValueError where tensors by name, such as a direction, have a part that no trainable parameter has."""
    own = policy.parameters
    for name, v in checks.instance(argument, tensors, Mapping, "tensors by name").items():
        checks.dense(f"{argument}[{name!r}]", checks.tensor(f"{argument}[{name!r}]", v, kind="number"))
        if name not in own or v.shape != own[name].shape:
            expected = f"shape {list(own[name].shape)}" if name in own else "the name of a trainable parameter"
            raise ValueError(f"{argument}[{name!r}]: expected {expected}, got {name!r} of shape {list(v.shape)}")
        if not torch.isfinite(v).all():
            raise ValueError(f"{argument}[{name!r}]: expected finite numbers, got NaN or infinity")


def _check_parameters(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    for name, p in checks.instance("parameters", parameters, Mapping, "tensors by name").items():
        if name not in own:
            raise ValueError(f"parameters: the model has none named {name!r}")
        checks.tensor(f"parameters[{name!r}]", p, own[name].shape)


def _kept(input_ids: Tensor, keep: int) -> int:
    """Of how many of the last positions of token ids [N, L] something is wanted."""
    checks.tensor("input_ids", input_ids, ("N", "L"), "integer")
    return checks.integer("keep", keep, minimum=1, maximum=input_ids.shape[1])


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
    checks.instance("path", path, (str, Path), "a folder or a hub id")
    checks.instance("dtype", dtype, (str, torch.dtype), f"one of {', '.join(DTYPES)}")
    dtype = DTYPES[checks.choice("dtype", str(dtype).removeprefix("torch."), DTYPES)]
    device = find_device(device)
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


def find_device(device: str | torch.device) -> torch.device:
    checks.instance("device", device, (str, torch.device), "'auto', 'cpu' or an available 'cuda' device")
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        expected = "expected 'auto', 'cpu' or an available 'cuda' device"
        raise ValueError(f"device: {expected}, got {str(device)!r}") from error
    return found
