"""`keye-jax inspect`."""


def inspect() -> None:
    raise NotImplementedError
