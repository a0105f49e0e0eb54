"""`python -m tiue` with FSDP on CPUs. accelerate keeps FSDP for GPUs, but torch shards with gloo, too."""

import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from tiue.distill import loop, method
from tiue.distill.average import Average
from tiue.distill.cli import main


class Sharding(Accelerator):
    """Does what accelerate does on GPUs when ACCELERATE_USE_FSDP is set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D", "Transformer2DModel"],
        )


class ShardedAverage(Average):
    """Fails if the average is not sharded."""

    def __init__(self, accelerator, model, config):
        super().__init__(accelerator, model, config)
        assert all(isinstance(parameter, DTensor) for parameter in self.parameters)


class ShardedTrained(method.Trained):
    """Fails if a network is not sharded."""

    def __init__(self, *given):
        super().__init__(*given)
        assert all(isinstance(parameter, DTensor) for parameter in self.parameters)


if __name__ == "__main__":
    from tiue.distill import vsd

    method.Accelerator, loop.Average, vsd.Trained = Sharding, ShardedAverage, ShardedTrained
    sys.exit(main())
