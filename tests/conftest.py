"""Fixtures come from plug-ins, one for each concern."""

pytest_plugins = ["tests.fix_stack", "tests.fix_services"]
