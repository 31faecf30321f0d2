from ..gradient_sync import GradientSync, find_wrapper  # noqa: F401
