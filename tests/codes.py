"""Errors are told apart by their codes, which stay when their wording is improved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nvflare_fm.errors import FmError


@contextmanager
def refused(code: str, kind: type[Any] = FmError, *names: object) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of this kind with this code that names these sites, tensors and settings.

    Gives pytest's account of it.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    for name in names:
        assert str(name) in str(caught.value)
