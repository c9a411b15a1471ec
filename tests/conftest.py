"""What tests of several folders share."""

import signal

import pytest


@pytest.fixture
def interruptible():
    """Ctrl-C as at a terminal: what runs in the background may ignore it, and its children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
