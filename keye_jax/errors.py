"""The one exception that means a user's mistake."""


class UserError(ValueError):
    """What a user asked for cannot be done; the message is one sentence with the field, the value and what is allowed.

    The command line prints the message alone and exits with 2; any other exception is a defect and keeps its traceback.
    """
