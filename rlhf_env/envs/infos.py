"""The infos of a vector environment: for each name an array [N] and, under `_name`, where it means anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = tuple[NDArray[Any], NDArray[np.bool_]]  # values [N] and where they mean anything [N]


def add_columns(infos: dict[str, Any], columns: dict[str, Column]) -> None:
    """Add columns to infos; where a name is there already, they win in their own rows."""
    for name, (values, where) in columns.items():
        if name in infos:
            infos[name] = np.where(where, values, infos[name])
            infos[f"_{name}"] = infos[f"_{name}"] | where
        else:
            infos[name] = np.full(values.shape, None if values.dtype == object else 0, dtype=values.dtype)
            infos[name][where] = values[where]
            infos[f"_{name}"] = where.copy()


def info_rows(infos: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Infos as one dict of plain values per environment; a key that does not hold there is missing."""
    rows: list[dict[str, Any]] = [{} for _ in range(n)]
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        column: Any = info_rows(values, n) if isinstance(values, dict) else values
        for i in np.flatnonzero(infos[f"_{key}"]).tolist():
            rows[i][key] = column[i].item() if isinstance(column[i], np.generic) else column[i]
    return rows
