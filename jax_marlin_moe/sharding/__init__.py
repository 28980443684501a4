"""Experts over the devices of a mesh: expert parallelism, tensor parallelism, and both together.

`MoESharding` says which axes of a mesh cut the experts and which the intermediate dimension; `place` brings a layer
into that form, and `parallel_layer` calls it. Inside a `jax.shard_map` of one's own, `parallel_experts` is the body,
and `partition_specs` and `tensor_parallel` are its parts.
"""

from jax_marlin_moe.sharding.moe_sharding import MoESharding as MoESharding
from jax_marlin_moe.sharding.parallel import parallel_experts as parallel_experts
from jax_marlin_moe.sharding.parallel import parallel_layer as parallel_layer
from jax_marlin_moe.sharding.placement import place as place
from jax_marlin_moe.sharding.replicas import place_experts as place_experts
from jax_marlin_moe.sharding.specs import partition_specs as partition_specs
from jax_marlin_moe.sharding.tensor_parallel import tensor_parallel as tensor_parallel
