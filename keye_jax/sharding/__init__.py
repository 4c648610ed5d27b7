"""How the model lies over several devices: sharding files, and the meshes and layouts made of them.

ShardingConfig.from_file(path)    what a file in `configs/sharding` says
Layout.create(config)             the mesh over the devices there are, with the file's rules
place(model, layout)              a model with its parameters where a layout wants them
"""

from keye_jax.sharding.file import ShardingConfig
from keye_jax.sharding.layout import Layout
from keye_jax.sharding.placement import place

__all__ = ["Layout", "ShardingConfig", "place"]
