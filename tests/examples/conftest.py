"""Fixtures of the example server."""

from tests.served import address, client, exported  # noqa: F401 - fixtures
