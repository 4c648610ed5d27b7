"""What operations raise when they cannot do what they were asked for."""


class UnsupportedError(NotImplementedError):
    """The operation has no implementation of the name asked for, or none that supports the arguments."""
