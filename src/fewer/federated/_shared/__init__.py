"""What federated methods share: splits over clients, an algorithm as three pure functions, and two engines that run it (here and Flower).

- `partition`: who holds which examples. `clients`: their batches. `sampling`: who takes part. `flat_model`: a model as one vector.
- `algorithm`: the three functions. `local_training`: the local loop. `baselines`: FedAvg, FedProx, SCAFFOLD, FedDyn, FedSAM.
- `simulate`: the in-process engine. `flower`: the same functions as Flower apps. `traffic`: bytes on the wire. `checkpoint`: resuming.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
