"""A site's rows: read, checked, tokenized."""
