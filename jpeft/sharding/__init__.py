"""The same training step on one device, on eight, on a pod.

JAX's own engine (SPMD under `jit`) does the work; what it needs to be told is where each array is kept. A mesh has three axes, any of
which may be 1: ``data`` (each group of devices has its own part of the batch), ``fsdp`` (the batch is split too, and so are the weights,
which are gathered layer by layer) and ``tensor`` (each device computes its part of a layer). The base is placed by ordered path rules, the
adapter as the weights that it changes, the optimizer's state as the adapter, the batch on ``data`` and ``fsdp``:

>>> import jax, jax.numpy as jnp, numpy as np, optax, jpeft
>>> from flax import linen as nn
>>> from jpeft import sharding
>>> model, tx = nn.Dense(8), optax.adamw(1e-3)
>>> mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)  # -1: the devices that are left
>>> peft = jpeft.apply(model.init(jax.random.key(0), jnp.ones((1, 16)))["params"], method="lora", rank=2)
>>> peft = sharding.shard(peft, mesh)  # own families have rules: rules=jpeft.models.partition_rules(model)
>>> tx = jpeft.optimizer(tx, peft)
>>> follow = sharding.state_shardings(jax.eval_shape(tx.init, peft.adapter), peft.adapter)
>>> opt_state = jax.jit(tx.init, out_shardings=follow)(peft.adapter)
>>> forward = jpeft.wrap(model.apply, peft.method)
>>> def step(adapter, opt_state, params, batch):
...     loss_fn = lambda adapter: forward(peft.replace(params=params, adapter=adapter).variables, batch["x"]).var()
...     loss, grads = jax.value_and_grad(loss_fn)(adapter)
...     updates, opt_state = tx.update(grads, opt_state, adapter)
...     return optax.apply_updates(adapter, updates), opt_state, loss
>>> kept = jax.tree.map(lambda leaf: leaf.sharding, peft.adapter)
>>> step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(kept, follow, None))  # inputs bring their own
>>> batch = sharding.shard_batch({"x": np.ones((16 * mesh.size, 16), np.float32)}, mesh)
>>> adapter, opt_state, loss = step(peft.adapter, opt_state, peft.params, batch)
>>> merged = jax.jit(jpeft.merge, out_shardings=sharding.shardings(peft.params, mesh))(peft.replace(adapter=adapter))

Everything here works on `jax.ShapeDtypeStruct` and `jax.sharding.AbstractMesh` too, so a model of any size is planned without a device:

>>> weights = {"up": {"kernel": jax.ShapeDtypeStruct((8192, 28672), jnp.bfloat16)}}
>>> print(sharding.plan(weights, sharding.abstract_mesh(256, fsdp=32, tensor=8)))  # doctest: +ELLIPSIS
256 devices: data=1, fsdp=32, tensor=8
<BLANKLINE>
base        count          shape     dtype                  spec  per device
up/kernel       1  (8192, 28672)  bfloat16  (·, (fsdp, tensor))     1.8 MiB
...
"""

from jpeft.sharding.activations import by_example as by_example
from jpeft.sharding.mesh import abstract_mesh as abstract_mesh
from jpeft.sharding.mesh import batch_sharding as batch_sharding
from jpeft.sharding.mesh import make_mesh as make_mesh
from jpeft.sharding.mesh import parse_mesh as parse_mesh
from jpeft.sharding.mesh import shard_batch as shard_batch
from jpeft.sharding.mesh import shard_rows as shard_rows
from jpeft.sharding.plan import Plan as Plan
from jpeft.sharding.plan import plan as plan
from jpeft.sharding.specs import Placement as Placement
from jpeft.sharding.specs import Rules as Rules
from jpeft.sharding.specs import fit as fit
from jpeft.sharding.specs import place as place
from jpeft.sharding.specs import placements as placements
from jpeft.sharding.specs import shard as shard
from jpeft.sharding.specs import shardings as shardings
from jpeft.sharding.specs import state_shardings as state_shardings
