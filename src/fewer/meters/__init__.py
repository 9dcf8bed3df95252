"""What a run costs: time, memory, energy, FLOPs, and whatever else can be counted.

>>> from fewer import meters
>>> with meters.measure(energy=False) as cost:
...     meters.count("network_calls", 3)
>>> cost.figures()["network_calls"]
3.0
>>> sorted(cost.figures())
['backward_passes', 'cpu_seconds', 'network_calls', 'peak_memory', 'seconds']
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
