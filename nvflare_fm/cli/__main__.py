"""`python -m nvflare_fm.cli` is `nvflare-fm`."""

from . import app

if __name__ == "__main__":
    app()
