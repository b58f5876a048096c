"""Whether a site is ready, before a job comes."""
