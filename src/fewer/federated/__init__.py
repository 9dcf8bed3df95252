"""Training one model over many clients that keep their data: fewer rounds, fewer bytes, fewer local steps.

An algorithm is three pure functions on flat parameter vectors; the in-process engine (`simulate`) and Flower (`FlowerStrategy`,
`flower_client_app`) run the same functions and give the same numbers.

>>> from fewer import federated
>>> [len(part) for part in federated.iid([0, 1] * 6, clients=3)]
[4, 4, 4]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
