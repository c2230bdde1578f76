"""RowScale: a trained scale for every input of a kernel. A skeleton to copy for a relative of LoRA.

Save the copy as ``jpeft/reparameterized/<name>.py``. jpeft finds every method in this folder by itself.
"""

import jax.numpy as jnp

from jpeft.core.options import Positive
from jpeft.reparameterized.matrix_form import INPUTS
from jpeft.reparameterized.weight_method import Key, Leaves, Matrix, WeightMethod


class RowScale(WeightMethod):
    """RowScale: ``W' = diag(1 + s g) W``, with g trained and zero at the start.

    Args:
      scale: s.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: from `init`, for a target that matches nothing or a kernel whose geometry is not known.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> jpeft.apply(params, method=RowScale()).adapter["dense"]["kernel"]["g"].shape
    (8,)

    Reference: authors, title, year, link. Say where the code differs from the paper or from HF PEFT.
    """

    scale: Positive = 1.0

    name = "row_scale"
    summary = "a scale for every input of a kernel"
    learning_rate = 1e-2
    leaf_axes = {"g": (INPUTS,)}  # which axes of the matrix [inputs, outputs] each leaf has

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """The leaves of one kernel at the start. Stacks of layers, heads, the task head and dtypes are the base class's business."""
        return {"g": jnp.zeros(kernel.shape[0])}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """The kernel's new value, for training and for merging alike."""
        return (1 + self.scale * leaves["g"])[:, None] * kernel

    # `call_linear` may be defined besides, where a layer can be run more cheaply than on its new kernel: see lora.py, dora.py and ia3.py.


row_scale = RowScale  # the public spelling: jpeft.row_scale(scale=2.0)
