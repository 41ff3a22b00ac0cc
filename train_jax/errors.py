"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
  """Bad input: its message is one sentence that names the value, the rule and the way out.

  `main.py` prints the message without a traceback and exits with code 2.
  """
