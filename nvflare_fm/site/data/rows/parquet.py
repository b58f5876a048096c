"""Apache Parquet, read by pyarrow a few rows at a time."""

from collections.abc import Iterator

from ....files import open_file
from . import Format, Reading, Row, registry, small

_BATCH = 64  # rows in memory at once


def _rows(reading: Reading) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    from .features import with_class_names

    with open_file(reading.file) as opened, ParquetFile(opened) as table:
        name = with_class_names(table.schema_arrow)
        records = (record for batch in table.iter_batches(_BATCH) for record in batch.to_pylist())
        for number, record in enumerate(records, start=1):
            yield number, small(name(record))


registry.register("parquet")(Format(("parquet", "pq"), _rows, is_text=False))
