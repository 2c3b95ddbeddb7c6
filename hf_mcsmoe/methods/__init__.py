"""The methods of every stage: pure functions of tensors. What a file that lies here registers is there."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
