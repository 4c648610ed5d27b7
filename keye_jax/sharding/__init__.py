"""How arrays lie over several devices. Nothing here knows the model.

ShardingConfig.from_file(path)    what a file in `configs/sharding` says
MeshRules.create(config)          the mesh over the devices there are, with the file's rules
StepSharding.prefill(rules)       how the arrays of one compiled step lie over that mesh; or `decode`
"""

from keye_jax.sharding.file import ShardingConfig
from keye_jax.sharding.mesh_rules import MeshRules
from keye_jax.sharding.step import StepSharding

__all__ = ["MeshRules", "ShardingConfig", "StepSharding"]
