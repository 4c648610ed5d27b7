"""What operations raise."""


class ArgumentError(ValueError):
    """A caller's mistake: an argument whose shape, dtype or value does not fit the operation or the other arguments."""


class UnsupportedError(NotImplementedError):
    """The operation has no implementation of the name asked for, or none that can do what was asked for."""
