"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """A fault that the user can mend: one line that names the key or file and says what to do."""


class DivergedError(UserError):
    """A training came to nothing in this epoch; what was saved after the one before is sound."""
