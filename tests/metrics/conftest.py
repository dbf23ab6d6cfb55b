"""What the tests of the metrics share."""

import jaxtyping
import pytest


@pytest.fixture
def without_shape_checks(monkeypatch):
    """Turns the shape annotations off, as they are for users, so that the functions' own checks speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
