"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As it was installed; `unknown` where it runs from its folder without being installed."""
    try:
        return version("proto-route")
    except PackageNotFoundError:
        return "unknown"
