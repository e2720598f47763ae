"""The files that come with the project: accelerate_configs/, ds_configs/, launch/, data/."""

from pathlib import Path


def asset(*parts: str) -> Path:
    """A file of the project: from the checkout, or from the installed package."""
    packaged = Path(__file__).parent / "assets"
    root = packaged if packaged.exists() else Path(__file__).parents[2]
    return root.joinpath(*parts)
