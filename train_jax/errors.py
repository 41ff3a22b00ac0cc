"""The exception for mistakes that the user can mend, and the checks that raise it most."""

from collections.abc import Iterable


class UserError(ValueError):
  """Bad input: its message is one sentence that names the value, the rule and the way out.

  `main.py` prints the message without a traceback and exits with code 2.
  """


def check_at_least(name: str, value: float, least: float) -> None:
  """Raises UserError unless `value`, which the user calls `name`, is at least `least`."""
  if not value >= least:  # NaN fails, too
    raise UserError(f"{name}={value} must be at least {least}.")


def check_above_zero(name: str, value: float) -> None:
  """Raises UserError unless `value` is above 0."""
  if not value > 0:
    raise UserError(f"{name}={value} must be above 0.")


def check_fraction(name: str, value: float, inclusive: bool = True) -> None:
  """Raises UserError unless `value` is in [0, 1], or in [0, 1) if not `inclusive`."""
  if not (0 <= value <= 1 if inclusive else 0 <= value < 1):
    raise UserError(f"{name}={value} must be between 0 and 1{'' if inclusive else ', below 1'}.")


def check_one_of(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises UserError unless `value` is one of `choices`."""
  choices = tuple(choices)
  if value not in choices:
    raise UserError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}.")
