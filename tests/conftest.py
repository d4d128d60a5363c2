"""Fixtures come from plug-ins, one for each concern."""

import hypothesis

pytest_plugins = ["tests.fix_stack", "tests.fix_services", "tests.fix_proxy"]

# A busy machine is no reason for a test to fail.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
