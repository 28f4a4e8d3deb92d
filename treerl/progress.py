"""How far a loop is: a bar on a terminal; in a log a plain line now and then."""

import sys

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of a log, at least


class _Log:
    """Standard error for tqdm where a line cannot be drawn over: each stays, and one of the same step is left out."""

    last = ""

    def write(self, text: str) -> None:
        step = text.partition("[")[0].strip()
        if step and step != self.last:
            print(text.strip(), file=sys.stderr, flush=True)
            self.last = step

    def flush(self) -> None:
        pass


def bar(name: str, total: int, *, initial: int = 0, show: bool = True) -> tqdm:
    """Counts the steps after `initial` up to `total`, with time left and a rate; `set_postfix_str` puts words behind them."""
    log = {}
    if not sys.stderr.isatty():
        log = dict(file=_Log(), mininterval=EVERY, maxinterval=float("inf"), miniters=1)
        log["bar_format"] = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(range(initial + 1, total + 1), name, total, initial=initial, disable=not show, unit="step", **log)


def words(reward: float | None, accuracy: float, tokens_per_second: float | None) -> str:
    """What a training step adds to its bar."""
    shown = ((reward, "reward {:.3f}"), (accuracy, "pass@1 {:.3f}"), (tokens_per_second, "{:,.0f} tokens/s"))
    return ", ".join(text.format(x) for x, text in shown if x is not None)
