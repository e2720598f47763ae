"""One source of rows, as a recipe names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .spellings import as_ours
from .value_types import Columns, Float, Format, Int, as_sources


class DataSource(BaseModel):
    """One source of rows. Keys that are left out are the recipe's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="a file, a folder that datasets saved or reads, or a hub name")
    split: str | None = Field(None, description="a split of a folder or hub name")
    name: str | None = Field(None, description="the configuration of a hub name that has several")
    format_type: Format | None = Field(None, description="as the recipe's format_type")
    columns: Columns | None = Field(None, description="as the recipe's columns")
    weight: Float = Field(1.0, gt=0, description="how often a row is used in an epoch; 0.5: another half each epoch")
    max_rows: Int | None = Field(None, gt=0, description="at most so many rows, chosen by the seed")


def _source(value: Any) -> Any:
    """Read a path alone; of a mapping, Axolotl's `type` as the format, other names of max_rows and those of formats."""
    if not isinstance(value, dict):
        return {"path": value} if isinstance(value, str) else value
    source = dict(value)
    if "format_type" not in source and "type" in source:
        source["format_type"] = source.pop("type")
    for theirs in ("max_samples", "num_samples"):
        if theirs in source and "max_rows" not in source:
            source["max_rows"] = source.pop(theirs)
    if isinstance(source.get("format_type"), str):
        source["format_type"] = as_ours("format_type", source["format_type"])
    return source


Source = Annotated[DataSource, BeforeValidator(_source)]
Sources = Annotated[list[Source], Field(min_length=1), BeforeValidator(as_sources)]
