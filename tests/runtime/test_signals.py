"""A stage or a fleet that is asked to leave: once, it does so when it can; twice, at once."""

import os
import signal
import subprocess
import sys

import pytest

from dynat.runtime.signals import graceful_stop


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_only_asks_to_stop_and_handlers_are_restored(signum: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with graceful_stop() as stop:
        states = [stop()]
        os.kill(os.getpid(), signum)
        states.append(stop())
        os.kill(os.getpid(), signal.SIGTERM)
    assert states == [False, True]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_breaks_off_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with graceful_stop():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fleet_that_listens_for_signals_need_not_wait_for_torch() -> None:
    code = "import sys, dynat.fleet.__main__, dynat.runtime.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
