"""What HF PEFT's own tests check of a method, on a linen and an NNX model, at 1e-5 where theirs go to 0.3.

Merged and unmerged, disabled, trained, rematerialised, saved and loaded, half precision, numbers that are none, chosen blocks, two
adapters. Methods are the rows of `tables.ROWS` that HF PEFT has a kind of; a new row joins by itself. What test_conformance.py checks of
linen models is checked of NNX alone. The models run without `jit`, so that methods share compiled operations.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import linen, linen_params, nnx_model
from tables import MERGES, ROWS, batch, noised

import jpeft
from jpeft.additive.prefixes.adaption_prompt import AdaptionPrompt
from jpeft.additive.prefixes.prefix_method import PrefixMethod
from jpeft.additive.prompts.prompt_method import PromptMethod

HOSTS = ("linen", "nnx")
SELECTIVE = ("ln_tuning", "trainable_tokens", "shira")  # of the methods that replace or change single numbers, those that HF PEFT has
ADDITIVE = (PromptMethod, PrefixMethod, AdaptionPrompt)


def _is_mirrored(name: str) -> bool:
    method = ROWS[name].method
    if name.startswith(("skeleton", "chain")) or method.requires_stats or method.name == "hard_prompt":
        return False
    return method.family == "reparameterized" or isinstance(method, ADDITIVE) or method.name in SELECTIVE


NAMES = list({ROWS[name].method.name: name for name in reversed(ROWS) if _is_mirrored(name)}.values())[::-1]  # a row for each method
MERGING = [name for name in NAMES if name not in MERGES]
CELLS = [(name, host) for name in NAMES for host in HOSTS]
each_cell = pytest.mark.parametrize(("name", "host"), CELLS, ids=["-".join(cell) for cell in CELLS])
pytestmark = pytest.mark.filterwarnings("ignore:.*found no task head")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One method on one model; the blocks of the NNX model are rematerialised, those of its linen twin are not."""

    name: str
    host: str

    @functools.cached_property
    def twin(self) -> str:
        """The models with attention cores; those with all kinds of layers, for methods that need them."""
        try:
            jax.eval_shape(lambda params: jpeft.apply(params, method=self.method), linen_params("core"))
        except ValueError:
            return "einsum"
        return "core"

    @property
    def method(self) -> jpeft.Method:
        return ROWS[self.name].method

    @property
    def model(self) -> Any:
        return nnx_model("core-remat" if self.twin == "core" else "einsum") if self.host == "nnx" else linen(self.twin).apply

    @functools.cached_property
    def peft(self) -> jpeft.Peft:
        base = linen_params(self.twin) if self.host == "linen" else self.model
        return jpeft.apply(base, method=self.method, key=jax.random.key(7))

    @functools.cached_property
    def noisy(self) -> jpeft.Peft:
        return with_noise(self.peft, seed=3)

    @functools.cached_property
    def half(self) -> tuple[jpeft.Peft, jax.Array]:
        """With little noise: on a base in bfloat16, and the outputs with the same numbers in float32."""
        cast = lambda dtype: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), self.peft.params)
        peft = with_noise(self.peft, seed=3, scale=0.01)
        same = subject(self.name, "linen").half[1] if self.host == "nnx" else self.logits(peft.replace(params=cast(jnp.float32)))
        return peft.replace(params=cast(jnp.bfloat16)), same

    def base_logits(self, params: Any) -> jax.Array:
        """The model without jpeft."""
        if self.host == "linen":
            return self.model({"params": params}, batch()["x"])
        copy = nnx.clone(self.model)
        nnx.update(copy, params)
        return copy(batch()["x"])

    @functools.cached_property
    def forward(self) -> Any:
        return jpeft.wrap(self.model)

    def logits(self, peft: jpeft.Peft) -> jax.Array:
        return self.forward(peft, batch()["x"])

    @functools.cached_property
    def step(self) -> tuple[jax.Array, Any]:
        """The outputs with noise on the adapter, and the gradient of all of its leaves."""

        def loss(adapter: Any) -> Any:
            logits = self.logits(self.noisy.replace(adapter=adapter))
            return jnp.sum(jnp.sin(logits)), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(self.noisy.adapter)
        return logits, grads


@functools.cache
def subject(name: str, host: str) -> Subject:
    return Subject(name, host)


@functools.cache
def answer(twin: str, host: str) -> jax.Array:
    """What the base answers before any method has been near it."""
    it = Subject(MERGING[0], host)
    it.__dict__["twin"] = twin
    return it.base_logits(it.peft.params)


def with_noise(peft: jpeft.Peft, seed: int, scale: float = 0.1) -> jpeft.Peft:
    """The same with noise on all that is trained."""
    labels, new = jpeft.flatten(peft.method.labels(peft.adapter)), jpeft.flatten(noised(peft.adapter, scale, seed))
    old = jpeft.flatten(peft.adapter)
    return peft.replace(adapter=jpeft.unflatten({path: old[path] if labels[path] == "freeze" else new[path] for path in old}))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def changes(peft: jpeft.Peft) -> dict[str, np.ndarray]:
    """What merging adds to each leaf of the base."""
    before, after = jpeft.flatten(peft.params), jpeft.flatten(jpeft.merge(peft))
    return {path: np.asarray(after[path]) - np.asarray(before[path]) for path in before}


# --- the base --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_begins_as_the_base(name):
    it = subject(name, "nnx")
    chex.assert_trees_all_close(it.logits(it.peft), answer(it.twin, "nnx"), atol=ROWS[name].tolerance)


@each_cell
def test_disabled_it_is_the_base(name, host):
    """After making, running, training and merging, the base has its bits, and the model without jpeft answers as it did."""
    it = subject(name, host)
    first, params, before = answer(it.twin, host), it.peft.params, bits(it.peft.params)
    _, grads = it.step
    tx = jpeft.optimizer(optax.sgd(0.1), it.noisy)
    updates, _ = tx.update(grads, tx.init(it.noisy.adapter), it.noisy.adapter)
    trained = it.noisy.replace(adapter=optax.apply_updates(it.noisy.adapter, updates))
    if name in MERGING:
        jpeft.merge(trained)
    assert trained.params is params
    assert bits(params) == before
    assert bits(it.base_logits(params)) == bits(first)


# --- training --------------------------------------------------------------------------------------------------------------------------


@each_cell
def test_all_that_is_trained_has_a_gradient_and_moves(name, host):
    it = subject(name, host)
    _, grads = it.step
    labels = jpeft.flatten(it.method.labels(it.noisy.adapter))
    silent = [path for path, leaf in jpeft.flatten(grads).items() if labels[path] != "freeze" and not np.abs(leaf).max() > 0]
    assert not silent
    tx = jpeft.optimizer(optax.sgd(1.0), it.noisy)
    updates, _ = tx.update(grads, tx.init(it.noisy.adapter), it.noisy.adapter)
    moved = {path: bool(np.abs(leaf).max() > 0) for path, leaf in jpeft.flatten(updates).items()}
    assert moved == {path: label != "freeze" for path, label in labels.items()}


@pytest.mark.parametrize("name", NAMES)
def test_rematerialised_blocks_have_the_same_gradients(name):
    """And the two hosts the same outputs."""
    plain, remat = subject(name, "linen").step, subject(name, "nnx").step
    chex.assert_trees_all_equal(subject(name, "linen").noisy.adapter, subject(name, "nnx").noisy.adapter)
    chex.assert_trees_all_close(remat, plain, atol=1e-5, rtol=1e-5)


# --- merging ---------------------------------------------------------------------------------------------------------------------------


@each_cell
def test_merged_is_unmerged(name, host):
    """And merging again gives the same bits."""
    it = subject(name, host)
    if name in MERGES:
        with pytest.raises(ValueError, match=MERGES[name]):
            jpeft.merge(it.noisy)
        return
    merged, (logits, _) = jpeft.merge(it.noisy), it.step
    chex.assert_trees_all_close(it.base_logits(merged), logits, atol=1e-5)
    assert bits(jpeft.merge(it.noisy)) == bits(merged)
    assert jnp.abs(logits - answer(it.twin, host)).max() > 1e-3


@pytest.mark.parametrize("name", MERGING)
def test_two_adapters(name):
    """In a chain both act. Where a change does not depend on the base, theirs is the sum of the two."""
    it = subject(name, "linen")
    method = it.method.replace(head=None) if "head" in dict(it.method.options) else it.method
    one, two = (with_noise(jpeft.apply(it.peft.params, method=method), seed) for seed in (3, 4))
    both = jpeft.Peft(it.peft.params, {"one": one.adapter, "two": two.adapter}, jpeft.chain(one=method, two=method))
    replaced, _, _ = jpeft.tree.split(one.params, one.adapter)
    if replaced:  # a leaf has one value
        return
    elsewhere = one.replace(params=noised(one.params, seed=5))
    first, second, moved = changes(one), changes(two), changes(elsewhere)
    is_additive = all(np.allclose(first[path], moved[path], atol=1e-6) for path in first)
    assert is_additive or not name.startswith("lora")
    if is_additive:
        chex.assert_trees_all_close(changes(both), {path: first[path] + second[path] for path in first}, atol=1e-5)
    if name == "lora" or not is_additive:
        chex.assert_trees_all_close(it.logits(both), it.base_logits(jpeft.merge(both)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MERGING)
def test_numbers_that_are_none_are_not_merged(name):
    it = subject(name, "linen")
    labels = jpeft.flatten(it.method.labels(it.noisy.adapter))
    path = next(path for path, label in labels.items() if label != "freeze")
    for bad in (np.nan, np.inf):
        leaves = jpeft.flatten(it.noisy.adapter)
        leaves[path] = leaves[path].at[(0,) * leaves[path].ndim].set(bad)
        with pytest.raises(ValueError, match="Cannot merge: the adapter holds numbers that are not finite") as error:
            jpeft.merge(it.noisy.replace(adapter=jpeft.unflatten(leaves)))
        assert path in str(error.value)


# --- files, precision, targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    """The same keys, the same bits, the same method; so the same outputs. On linen models the other's adapter, too."""
    it = subject(name, "nnx")
    jpeft.save(tmp_path / "out", it.noisy)
    for host in HOSTS:
        loaded = jpeft.load(tmp_path / "out", subject(name, host).peft.params)
        assert loaded.method == it.method
        assert list(jpeft.flatten(loaded.adapter)) == list(jpeft.flatten(it.noisy.adapter))
        assert bits(loaded.adapter) == bits(it.noisy.adapter)


@each_cell
def test_half_precision(name, host):
    """A base in bfloat16 answers within 1e-2 of the same numbers in float32, relative to the norm; the adapter stays in float32."""
    it = subject(name, host)
    half, want = it.half
    assert {leaf.dtype for leaf in jax.tree.leaves(half.adapter)} == {jnp.dtype("float32")}
    got = it.logits(half)
    assert got.dtype == (
        jnp.bfloat16 if host == "linen" else answer(it.twin, host).dtype
    )  # NNX layers keep the dtype that they were made in
    assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 1e-2 * jnp.linalg.norm(want)


@pytest.mark.parametrize("name", [name for name in NAMES if "target" in dict(ROWS[name].method.options)])
def test_chosen_blocks_are_all_that_is_adapted(name):
    """As `layers_to_transform`: the leaves are those that all blocks together would have in this one."""
    it = subject(name, "linen")
    everywhere = jpeft.flatten(it.peft.adapter)
    replaced, beside, added = jpeft.tree.split(it.peft.params, it.peft.adapter)
    inside = lambda path: path.startswith("layer_1/")
    owners = [path for path in (*replaced, *beside) if inside(path)] or ["layer_1/attn/key/kernel"]
    assert any(map(inside, (*replaced, *beside, *added))) or name == "prefix_tuning"  # whose network is at the root
    # (IA)³ has two targets: what it scales the outputs of, and what the inputs.
    options = {"target": tuple(owners)} | ({"feedforward": ("layer_1/down",)} if name == "ia3" else {})
    chosen = jpeft.flatten(jpeft.apply(it.peft.params, method=it.method.replace(**options)).adapter)
    want = {path for path in everywhere if not path.startswith("layer_0/")}
    outside = {path for path in want if not inside(path) and path.partition("/")[0] not in ("classifier", "+")}
    assert set(chosen) == want - outside
