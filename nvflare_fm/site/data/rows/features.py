"""Names of classes that `datasets` keeps as numbers: its schema says which column is a `ClassLabel`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

Record = Mapping[str, Any]


def with_class_names(schema: Any) -> Callable[[Record], Record]:
    """What replaces each number of a class by its name, in the rows of a table with this Arrow schema.

    A number that is no class stays as it is; -1, which stands for an unknown class, is no value.
    """
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(schema)
    except Exception:  # what a file says of its features may be anything; the numbers remain
        return dict
    classes = {}
    for column, feature in features.items():
        item = getattr(feature, "feature", feature)
        if isinstance(item, ClassLabel) and item.names:
            classes[column] = partial(_named, tuple(map(str, item.names)))
    return lambda record: {
        column: classes[column](value) if column in classes else value for column, value in record.items()
    }


def _named(names: tuple[str, ...], value: Any) -> Any:
    if isinstance(value, list):
        return [_named(names, each) for each in value]
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None
