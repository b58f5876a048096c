"""Rows that a model wrote: candidates from public words, private votes on them, and what a site adds."""
