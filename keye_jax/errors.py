"""The exception for mistakes of a user, and how its messages show values."""


class UserError(ValueError):
    """A mistake of a user. The message is one sentence with the field, the value and what is allowed.

    The command line prints only the message and exits with 2. Any other exception is a defect and keeps its traceback.

    Attributes:
      field: the path of the field in the body of a request, such as "stop" or "logit_bias.7"; None if there is none.
    """

    def __init__(self, message: str = "", *, field: str | None = None):
        super().__init__(message)
        self.field = field


class MediaError(UserError):
    """A mistake in an image or a video of a request, or in one of its options."""


class UnreachableError(MediaError):
    """A medium that cannot be fetched for now, and may be later: the download broke off, or the server is busy."""


def shorten(value: object, limit: int = 80) -> str:
    """`value` for an error message: one line of at most `limit` characters, whatever it is."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    try:
        text = " ".join(repr(value).split())
    except Exception:  # too deep, an integer of too many digits, or a class of the caller that fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shorten_name(name: object) -> str:
    """The name of a field for an error message: `name` without quotes, in one line, whatever it is."""
    return shorten(name)[1:-1] if isinstance(name, str) else shorten(name)
