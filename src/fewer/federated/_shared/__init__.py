"""What federated methods share: splits over clients, an algorithm as three pure functions, and the engines that run it.

- `partition`: who holds which examples. `clients`: their batches. `sampling`: who takes part. `flat_model`: a model as one vector.
- `algorithm`: the three functions. `local_training`: the local loop. `baselines`: FedAvg, FedProx, SCAFFOLD, FedDyn, FedSAM.
- `simulate`: the in-process engine. `asynchrony`: the same where clients come when they like. `checkpoint`: resuming.
- `flower`, `flower_clients`, `flower_records`: the same functions as Flower apps. `traffic`: bytes on the wire.
- `topology`, `gossip`, `peers`: graphs of clients that have no server, and the engines that run them: here, and a process a client.
- `black_box`: functions in the place of models and examples. `problems`: what the studies are about. `command`: `fewer federated`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
