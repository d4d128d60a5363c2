"""Fixtures come from plug-ins, one for each concern."""

import hypothesis
import pytest

pytest_plugins = ["tests.fix_stack", "tests.fix_services", "tests.fix_proxy", "tests.fix_browser"]

# A busy machine is no reason for a test to fail.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have to say even when they pass: exact counts, seeds."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "summary":
                    terminalreporter.write_line(str(value))
