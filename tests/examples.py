"""How many examples a test draws: a few in ``make unit``, more with ``--hypothesis-profile full``."""

from __future__ import annotations

import hypothesis


def examples(factor: int = 1) -> int:
    """This many times as many as a test of Hypothesis draws by itself."""
    return factor * hypothesis.settings().max_examples


def many(factor: int) -> hypothesis.settings:
    """For a test of Hypothesis that needs more examples than others."""
    return hypothesis.settings(max_examples=examples(factor))
