"""Label-efficient vision pretraining and low-communication training for transformers.Trainer and accelerate.

Every public name is imported from here. `__init__.pyi` lists them; a name loads its own module on first use.
"""

import lazy_loader

__version__ = "0.1.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
