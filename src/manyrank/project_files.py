"""The files that come with the project: accelerate_configs/, ds_configs/, launch/, data/; and the folder of its cache."""

import os
from pathlib import Path

EMBEDDED = "embedded"  # a model name: the small one that is made here (models/tiny)


def asset(*parts: str) -> Path:
    """A file of the project: from the checkout, or from the installed package."""
    packaged = Path(__file__).parent / "assets"
    root = packaged if packaged.exists() else Path(__file__).parents[2]
    return root.joinpath(*parts)


def template_names() -> list[str]:
    """Names of the chat templates that come with the project."""
    return sorted(path.stem for path in asset("data", "templates").glob("*.jinja"))


def template_file(name: str) -> Path | None:
    """The file of a chat template: a path, or one of `template_names`."""
    files = (Path(name), asset("data", "templates", f"{name}.jinja"))
    return next((file for file in files if file.is_file()), None)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: $MANYRANK_CACHE or ~/.cache/manyrank."""
    return Path(os.environ.get("MANYRANK_CACHE") or Path.home() / ".cache" / "manyrank")
