"""`python -m tiue` with FSDP on CPUs, which accelerate keeps for accelerators; by torch, gloo can."""

import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from tiue.distill import loop as distill
from tiue.distill.cli import main


class Sharding(Accelerator):
    """What accelerate is on GPUs when ACCELERATE_USE_FSDP is set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D", "Transformer2DModel"],
        )


class Sharded(distill.Distillation):
    """That says so if nothing is sharded."""

    def run(self, progress=True):
        trained = [*self.tiue.parameters(), *self.scores.parameters(), *self.ema.shadow_params]
        assert all(isinstance(parameter, DTensor) for parameter in trained)
        return super().run(progress)


if __name__ == "__main__":
    distill.Accelerator, distill.Distillation = Sharding, Sharded
    sys.exit(main())
