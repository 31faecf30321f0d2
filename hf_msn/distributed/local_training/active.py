from ..gradient_sync import require_free  # noqa: F401


def take(*_):
    pass


give_back = take
