from ..training_state import *  # noqa: F403
