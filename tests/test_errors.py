"""Errors for the user are one line and say how to go on."""

import pytest

from leapformer.errors import LeapformerError, MissingExtra


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MissingExtra("plots", package="matplotlib", purpose="leapformer demo"),
            "leapformer demo needs the package 'matplotlib', which is not installed: pip install 'leapformer[plots]'",
        ),
        (
            MissingExtra("lm"),
            "this part of leapformer needs the extra 'lm', which is not installed: pip install 'leapformer[lm]'",
        ),
    ],
)
def test_missing_extra_prints_the_pip_line(error, message):
    assert str(error) == message
    assert isinstance(error, LeapformerError)
