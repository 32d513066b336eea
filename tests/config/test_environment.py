"""References to environment variables."""

from __future__ import annotations

import pytest

from kdcli.config.environment import expand
from kdcli.errors import ConfigError


def test_references_are_replaced_at_every_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    value = {"a": ["${oc.env:PLACE}/x", 3], "b": {"c": "${oc.env:NOWHERE,/tmp}"}}
    assert expand(value) == {"a": ["/data/x", 3], "b": {"c": "/tmp"}}


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(ConfigError, match="ABSENT is not set; export ABSENT="):
        expand("${oc.env:ABSENT}")
