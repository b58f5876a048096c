"""Workbooks of Excel (.xlsx), read by openpyxl: a sheet whose first row is the header, values as they were saved.

No formula is computed, no link followed and no macro run. A workbook is a zip file of XML: how much it unpacks to is
checked before any of it is read, and entities in it are refused (defusedxml).
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ....files import MIB, open_file
from . import Format, Reading, Row, registry, small

_EXPANDS, _ALWAYS = 200, 64 * MIB  # a workbook holds at most so many times its size, or so many bytes
_COLUMNS, _LAST = 200, 2**20  # columns that are read, and the last row that Excel has


def _rows(reading: Reading) -> Iterator[Row]:
    with open_file(reading.file) as opened:
        book = _open(opened)
        sheet = book[_sheet(book.sheetnames, reading.split)]
        if sheet is None or not hasattr(sheet, "reset_dimensions"):
            raise ValueError("it has no sheet with cells")
        sheet.reset_dimensions()  # what a sheet says of its size need not be so
        names: list[str] = []
        above = True  # no row is read yet: a line of its own above the header may be the table's title
        for number, cells in enumerate(sheet.iter_rows(max_col=_COLUMNS, values_only=True), start=1):
            if number > _LAST:
                raise ValueError(f"it has a row beyond {_LAST}")
            if cells.count(None) == len(cells) or not any(str(cell).strip() for cell in cells if cell is not None):
                continue
            filled = len(cells) - cells.count(None)
            if names and not (above and len(names) == 1 and filled > 1):
                above = False
                yield number, small({name: cell for name, cell in zip(names, cells, strict=False) if name})
                continue
            names = ["" if cell is None else str(cell).strip() for cell in cells]
            while not names[-1]:
                names.pop()


def _open(opened: Any) -> Any:
    import openpyxl

    if not openpyxl.DEFUSEDXML:
        raise ValueError("the Python package defusedxml is missing, which guards against entities in XML")
    with zipfile.ZipFile(opened) as packed:
        size, packed_size = sum(part.file_size for part in packed.infolist()), opened.seek(0, 2)
    if size > max(_ALWAYS, _EXPANDS * packed_size):
        raise ValueError(f"unpacked, it is larger than {max(_ALWAYS, _EXPANDS * packed_size)} bytes")
    opened.seek(0)
    return openpyxl.load_workbook(opened, read_only=True, data_only=True, keep_links=False)


def _sheet(names: Sequence[str], split: str) -> str:
    return split if split in names else names[0]


def _settle(reading: Reading, head: str) -> Reading:
    with open_file(reading.file) as opened:
        names = _open(opened).sheetnames
    if len(names) < 2:
        return reading
    return replace(reading, remark=f"sheet {_sheet(names, reading.split)!r}, one of {len(names)}")


registry.register("excel")(Format(("xlsx", "xlsm"), _rows, is_text=False, settle=_settle))
