"""`keye-jax convert`."""


def convert() -> None:
    raise NotImplementedError
