"""Signals and slow steps, as the host loop hears of them."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from treerl import supervision
from treerl.errors import UserError
from treerl.supervision import Signals, Stopped, Watchdog, stop_if_diverged


def run_steps(watchdog, seconds):
    for number, wait in enumerate(seconds, 1):
        with watchdog.step(number):
            time.sleep(wait)


def test_the_watchdog_names_a_step_that_hangs(capsys):
    """Ten times the median of the others, of which the first, that compiles, is none."""
    run_steps(Watchdog(least=0), [0.5, 0.01, 0.01, 0.01, 0.01, 1.0, 0.01])
    text = capsys.readouterr().err
    assert text.count("has taken") == 1 and "step 6 has taken" in text
    assert "the median is 0.01" in text and text.endswith("A device, a grader or the network may hang.\n")


def test_the_watchdog_is_quiet(capsys):
    """About steps of usual length, before it knows what is usual, and below a least number of seconds."""
    run_steps(Watchdog(least=0), [0.01, 0.01, 0.01, 0.6, 0.01, 0.02])
    run_steps(Watchdog(least=60), [0.01] * 5 + [0.6])
    assert capsys.readouterr().err == ""


def test_the_watchdog_lets_errors_through():
    watchdog = Watchdog(least=0)
    with pytest.raises(ValueError), watchdog.step(1):
        raise ValueError
    assert len(watchdog._seconds) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        signals.check()
        assert signals.asked() is None
        os.kill(os.getpid(), number)
        assert signals.asked() == signal.Signals(number).name
        with pytest.raises(Stopped):
            signals.check()
        assert signal.getsignal(number) is before  # a second one ends at once
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup wishes."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.asked() is None
    finally:
        signal.signal(signal.SIGINT, before)


BUSY = """
import hashlib
from treerl.supervision import Signals
with Signals() as signals:
    with signals.nothing_to_lose("nothing was lost."):
        print("ready", flush=True)
        WORK
"""
IN_C, IN_PYTHON = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)', "while True: pass"


@pytest.mark.parametrize("work", [IN_C, IN_PYTHON])
def test_with_nothing_to_lose_a_signal_ends_at_once(work):
    """One sentence, whichever thread is first; also in one long call of C, as while XLA compiles, where handlers have to wait."""
    run = subprocess.Popen([sys.executable, "-c", BUSY.replace("WORK", work)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    _, text = run.communicate(timeout=120)
    assert (run.returncode, text) == (supervision.AGAIN, "\nSIGTERM: nothing was lost.\n")


def test_too_many_updates_that_were_skipped():
    stop_if_diverged(SimpleNamespace(skipped=2), 2, "step 5", "do something.", 3)
    with pytest.raises(UserError, match="not finite in 2 updates in a row, all of the run's; do something."):
        stop_if_diverged(SimpleNamespace(skipped=2), 2, "step 2", "do something.", 2)
    with pytest.raises(UserError) as error:
        stop_if_diverged(SimpleNamespace(skipped=3), 2, "step 5", "do something.")
    assert str(error.value) == (
        "step 5: loss or gradient was not finite in 3 updates in a row, more than learner.max_skipped=2; do something."
    )
