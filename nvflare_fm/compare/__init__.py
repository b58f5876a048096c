"""`nvflare-fm compare`: which configuration to use where sites differ, measured on public data or on yours.

The core never imports this package.
"""
