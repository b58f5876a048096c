"""The base model at a site, and what is attached to it."""
