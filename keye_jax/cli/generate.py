"""`keye-jax generate`."""


def generate() -> None:
    raise NotImplementedError
