"""The run-time checker of the tests' import hook: beartype, with an int wherever a float is asked."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
