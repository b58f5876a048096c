"""What checks the annotations of the core in a test run: beartype, for which an int is a float as mypy has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
