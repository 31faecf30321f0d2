from ..gradient_sync import ForwardScope  # noqa: F401
