"""The exception for mistakes of a user."""


class UserError(ValueError):
    """A mistake of a user. The message is one sentence with the field, the value and what is allowed.

    The command line prints only the message and exits with 2. Any other exception is a defect and keeps its traceback.
    """
