"""Options and settings shared by all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# As in the command line: spinning threads make tests many times slower on busy cores. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SLOW_STEPS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

# Behind nohup or & interrupts are ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("local", deadline=None, suppress_health_check=SLOW_STEPS)
settings.register_profile("ci", deadline=None, suppress_health_check=SLOW_STEPS, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden files anew; review them by eye")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--regenerate") and os.environ.get("CI"):
        raise pytest.UsageError("--regenerate is for a person to review; CI compares goldens, it never writes them")


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--regenerate"))
