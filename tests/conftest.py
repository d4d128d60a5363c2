"""What all tests share; fixtures come from plug-ins, one for each concern."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import hypothesis
import pytest

# They start servers and import half of the project: unit tests do without.
FOR_SERVERS = ("tests.fix_stack", "tests.fix_services", "tests.fix_proxy", "tests.fix_browser")

# A few examples while somebody waits; --hypothesis-profile full draws more. A busy machine fails no test.
hypothesis.settings.register_profile("few", deadline=None, max_examples=5)
hypothesis.settings.register_profile("full", deadline=None, max_examples=100)
hypothesis.settings.load_profile("few")

# Arrow looks for it at each time that it converts; not to find it again and again is a fifth of the unit tests' time.
if importlib.util.find_spec("dateutil") is None:
    sys.modules["dateutil"] = None  # type: ignore[assignment]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> None:
    """Load the fixtures of servers where they are needed."""
    if file_path.parent.name in {"integration", "chaos"}:
        for plugin in FOR_SERVERS:
            parent.config.pluginmanager.import_plugin(plugin)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have to say even when they pass: exact counts, seeds."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "summary":
                    terminalreporter.write_line(str(value))
