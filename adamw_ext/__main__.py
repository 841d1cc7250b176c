"""``python -m adamw_ext`` prints :func:`adamw_ext.build_info`."""

from adamw_ext import build_info

for name, value in build_info().items():
    print(f"{name + ':':18}{', '.join(value) if isinstance(value, list) else value}")
