"""Whether mathematical answers are equal, by the package math-verify: a program that `rewards.math` runs.

It reads a JSON list of pairs (response, answer) and writes a line of JSON for each: true, false, or null where the
answer is nothing that math-verify can read. A process of its own, because a response such as 9^(9^(9^9)) keeps Python
in one uninterruptible operation: the time limits of math-verify do not end that (and work in a main thread only), while
the operating system ends a process. `rewards.math` goes on after the pair that was too much.
"""

import json
import logging
import signal
import sys

from math_verify import parse, verify

SECONDS = 5


def main() -> None:
    # It warns once that its own time limits are off.
    logging.disable()
    for response, answer in json.load(sys.stdin):
        signal.alarm(SECONDS)
        expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        found = parse(response, parsing_timeout=None) if expected else []
        verdict = bool(verify(expected, found, timeout_seconds=None)) if expected else None
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
