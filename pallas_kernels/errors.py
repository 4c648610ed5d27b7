"""What operations raise when they cannot do what they were asked for."""


class UnsupportedError(NotImplementedError):
    """No implementation that was asked for supports the arguments; the message lists each one's reason."""
