"""The site of a prompt is a static node among the parameters: what flax's lifted transforms and jit make of it."""

import chex
import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from tables import noised

import jpeft
from jpeft.additive.prompts.prompt_site import PromptSite

KEY, VOCAB, WIDTH = jax.random.key(0), 11, 4
IDS = jax.random.randint(jax.random.key(1), (3, 6), 0, VOCAB)
SITE = PromptSite(table="embed/embedding", body="", vocabulary=VOCAB, width=WIDTH, rows=2, edges=(1, 0), causal=True)


class Body(nn.Module):
    """Embeds and sums up, so that every output depends on all tokens in front of it."""

    @nn.compact
    def __call__(self, ids):
        return jnp.cumsum(nn.Dense(WIDTH, name="dense")(nn.Embed(VOCAB, WIDTH, name="embed")(ids)), axis=1)


class Step(nn.Module):
    """A body as `nn.scan` wants it: a carry, and one of several texts."""

    @nn.compact
    def __call__(self, carry, ids):
        return carry, Body(name="body")(ids)


def scanned(cls):
    stack = nn.scan(cls, variable_broadcast="params", split_rngs={"params": False})
    return lambda ids: stack(name="body")(0.0, ids[None])[1][0]


BODIES = {
    "plain": lambda: Body(name="body"),
    "remat": lambda: nn.remat(Body)(name="body"),
    "remat-dots": lambda: nn.remat(Body, policy=jax.checkpoint_policies.dots_saveable)(name="body"),
    "jit": lambda: nn.jit(Body)(name="body"),
    "vmap": lambda: nn.vmap(Body, in_axes=1, out_axes=1, variable_axes={"params": None}, split_rngs={"params": False})(name="body"),
    "map_variables": lambda: nn.map_variables(Body, "params", lambda tree: tree, mutable=True)(name="body"),
    "scan": lambda: scanned(Step),
    "scan-remat": lambda: scanned(nn.remat(Step)),
    "scan-jit": lambda: scanned(nn.jit(Step)),
}


class Model(nn.Module):
    """A body under a lifted transform."""

    lift: str

    @nn.compact
    def __call__(self, ids):
        # Under `nn.vmap` each member of axis 1 is a batch of texts.
        return BODIES[self.lift]()(ids[:, None])[:, 0] if self.lift == "vmap" else BODIES[self.lift]()(ids)


@pytest.mark.parametrize("lift", BODIES)
@pytest.mark.parametrize("kind", ["prompt", "words"])
def test_a_body_under_a_lifted_transform(lift, kind):
    """Outputs and gradients are those of the plain body; a hard prompt has no array among its leaves, only the static node."""
    ids, template = IDS, (("start", 1 if kind == "prompt" else (3,)), ("end", (-1, 4) if kind == "prompt" else (4, 5)))
    method = (jpeft.prompt_tuning if kind == "prompt" else jpeft.hard_prompt)(template=template, edges=(1, 1), causal=True)
    plain = Model("plain").init(KEY, ids)["params"]
    rename = lambda params: {"body": {"body": params["body"]}} if lift.startswith("scan") else params
    results = []
    for model, params in ((Model("plain"), plain), (Model(lift), rename(plain))):
        peft = jpeft.apply(params, method=method)
        peft = peft.replace(adapter=noised(jax.tree.map(jnp.zeros_like, peft.adapter), scale=1.0))
        forward = jpeft.wrap(model.apply, method)
        run = lambda variables, ids, forward=forward: jnp.sin(forward(variables, ids))
        loss = lambda variables, ids, run=run: run(variables, ids).sum()
        grads = jax.jit(jax.grad(loss))(peft.variables, ids)
        members = jax.jit(jax.vmap(run, in_axes=(None, 0)))(peft.variables, ids[:, None])[:, 0]
        results.append((run(peft.variables, ids), jax.jit(run)(peft.variables, ids), members, jax.tree.leaves(grads)))
        assert results[-1][0].shape == (*ids.shape, WIDTH)
    chex.assert_trees_all_close(results[0], results[1], atol=1e-5)
    chex.assert_trees_all_close(results[1][0], results[1][1], results[1][2], atol=1e-5)


SLICED = {
    "scan": lambda cls: nn.scan(cls, variable_axes={"params": 0}, split_rngs={"params": True}, length=2),
    "remat in scan": lambda cls: nn.scan(nn.remat(cls), variable_axes={"params": 0}, split_rngs={"params": True}, length=2),
    "vmap": lambda cls: nn.vmap(cls, in_axes=(None, None), variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lift", SLICED)
def test_a_transform_that_slices_parameters_hands_the_node_on(lift, frozen):
    seen = []

    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            if self.scope.has_variable("params", "site"):
                seen.append(self.scope.get_variable("params", "site"))
            return nn.Dense(WIDTH, name="dense")(x), None

    class Top(nn.Module):
        @nn.compact
        def __call__(self, x):
            return SLICED[lift](Reader)(name="reader")(x, None)[0]

    x = jnp.ones((3, WIDTH))
    params = Top().init(KEY, x)["params"]
    params = {"reader": {**params["reader"], "site": SITE}}
    params = flax.core.freeze(params) if frozen else params
    loss = lambda params: Top().apply({"params": params}, x).sum()
    jax.jit(jax.grad(loss))(params)
    _, changed = Top().apply({"params": params}, x, mutable=["params"])
    assert seen
    assert set(seen) == {SITE} == {changed["params"]["reader"]["site"]}


def test_equal_sites_share_a_trace_and_others_do_not():
    """Two methods with leaves of equal shapes, in one jitted function and under `nn.jit`, which caches by the structure of its inputs."""
    params = Model("jit").init(KEY, IDS)["params"]
    peft = jpeft.apply(params, method="prompt_tuning", length=2)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def run(peft, ids):
        return jpeft.wrap(Model("jit").apply, peft.method)(peft.variables, ids)

    first, behind = (run(peft.replace(method=jpeft.prompt_tuning(length=2, edges=edges)), IDS) for edges in ((0, 0), (1, 0)))
    chex.assert_trees_all_close(first, run(peft.replace(method=jpeft.prompt_tuning(length=2, edges=[0, 0])), IDS))
    assert jnp.abs(first - behind)[:, 0].max() < 1e-6  # causal: what follows the first token is read behind the prompt
    ends = [
        run.__wrapped__.__wrapped__(peft.replace(method=jpeft.prompt_tuning(length=2, edges=e, causal=False)), IDS)
        for e in ((0, 0), (1, 0))
    ]
    assert jnp.abs(ends[0] - ends[1])[:, 0].max() > 1e-2  # else at the token itself, in front of the prompt or behind


class AnyInputs(nn.Module):
    """Takes further inputs without names."""

    @nn.compact
    def __call__(self, ids, *scales):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        for scale in scales:
            x = x * scale
        return x


def test_inputs_without_names_reach_the_body():
    peft = jpeft.apply({"embed": {"embedding": jnp.ones((VOCAB, WIDTH))}}, method="prompt_tuning", length=2)
    forward = jpeft.wrap(AnyInputs().apply, peft.method)
    chex.assert_trees_all_close(forward(peft.variables, IDS, 2.0, 3.0), 6.0 * jnp.ones((*IDS.shape, WIDTH)))
    with pytest.raises(ValueError, match="'input 1' of 'the model' has an entry for each token"):
        forward(peft.variables, IDS, jnp.ones(IDS.shape))
