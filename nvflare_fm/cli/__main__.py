"""`python -m nvflare_fm.cli` is `nvflare-fm`."""

from . import app

app()
