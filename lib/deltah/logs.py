"""The records of a run while it goes on: as JSON lines, at transformers' reporters, and on a progress bar."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from deltah import checks
from deltah.policies import Policy

# What the progress bar shows.
SHOWN = ("reward", "entropy")
EXPECTED = "names of transformers' reporters, or TrainerCallbacks"


class Log:
    """Takes a run's records as they come. A context: on leaving, reporters and the bar are closed.

    Args:
        path: a file of JSON lines, written anew with the records so far; None: no file.
        records: those so far, to which new ones are added.
        reporters: callbacks of transformers' Trainer, of which the events of training's begin and end and of logging
            are called.
        policy: that is trained.
        steps: of the run; done: of them already.
    """

    def __init__(self, path: Path | None, records: list[dict[str, Any]], reporters: Sequence[TrainerCallback],
                 policy: Policy, steps: int, done: int):
        self.path, self.records, self.reporters, self.policy = path, records, reporters, policy
        self.state = TrainerState(global_step=done, max_steps=steps)

    def __enter__(self) -> Log:
        if self.path is not None:
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text("".join(map(_line, self.records)))
            os.replace(partial, self.path)
        if self.reporters:
            # What a reporter may read of a Trainer's arguments; where there is none of its own, it writes there.
            folder = self.path.parent if self.path is not None else Path()
            self.arguments = TrainingArguments(str(folder), report_to=[], use_cpu=self.policy.device.type == "cpu")
        self._tell("on_train_begin")
        self.bar = tqdm(total=self.state.max_steps, initial=self.state.global_step, desc="train", unit="step")
        return self

    def add(self, record: dict[str, Any], kept: bool = True) -> None:
        """Show a step on the bar, and keep and hand on what it is recorded by."""
        self.state.global_step = record["step"]
        self.bar.set_postfix({name: f"{record[name]:.3f}" for name in SHOWN}, refresh=False)
        self.bar.update()
        if not kept:
            return
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(_line(record))
        self._tell("on_log", logs={name: x for name, x in record.items()
                                   if name != "step" and not isinstance(x, str) and math.isfinite(x)})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.bar.close()
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for reporter in self.reporters:
            getattr(reporter, event)(self.arguments, self.state, TrainerControl(), model=self.policy.model,
                                     processing_class=self.policy.tokenizer, **more)


def find_reporters(report_to: str | TrainerCallback | Sequence[str | TrainerCallback] | None) -> list[TrainerCallback]:
    """Callbacks by transformers' names ("tensorboard", "wandb", ..., "all"), or as they are.

    Raises:
        TypeError: neither names nor callbacks. ValueError: an unknown name. ImportError: a reporter's package is
            missing.
    """
    found: list[TrainerCallback] = []
    for each in [] if report_to is None else report_to if isinstance(report_to, (list, tuple)) else [report_to]:
        checks.instance("report_to", each, (str, TrainerCallback), EXPECTED)
        if isinstance(each, TrainerCallback):
            found.append(each)
            continue
        try:
            found += [kind() for kind in get_reporting_integration_callbacks(each)]
        except ValueError as error:
            raise ValueError(f"report_to: expected {EXPECTED} ({error})") from error
        except RuntimeError as error:  # what each of them raises where its package is missing
            raise ImportError(f"report_to: {error}") from error
    return found


def _line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, which knows neither NaN nor infinity."""
    return json.dumps({name: None if isinstance(x, float) and not math.isfinite(x) else x
                       for name, x in record.items()}) + "\n"
