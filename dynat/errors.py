"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A fault that the user can mend: one line that names the key or file and says what to do."""
