"""Models as people write them: whole variables, running means, convolutions under any name, heads under any name."""

import inspect
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict
from jax import ShapeDtypeStruct

import jpeft
from jpeft.stats import fisher, movement
from jpeft.tree.head import unknown_heads
from jpeft.tree.kernels import KernelAxes, axes_of


class Block(nn.Module):
    """Two convolutions, a shortcut and a running mean."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), use_bias=False, name="first")(x))
        return nn.Conv(4, (1, 1), name="shortcut")(x) + nn.ConvTranspose(4, (3, 3), name="up")(nn.relu(y))


class Images(nn.Module):
    """A small classifier of images."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (5, 5), strides=2, name="stem")(x)
        x = Block(name="block")(Block(name="stage_0")(x, train), train)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = x.mean((1, 2)) + nn.Conv(4, (3,), name="Conv_0")(x.mean(1)).mean(1)
        return nn.Dense(3, name="classifier")(x)


IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.fixture(scope="module")
def images():
    """The model and its variables."""
    model = Images()
    return model, model.init(jax.random.key(0), IMAGES)


# --- whole variables --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="classifier")(nn.Dense(4, name="dense")(x))


@pytest.mark.parametrize("form", [lambda v: v, FrozenDict, lambda v: FrozenDict({"params": v})])
def test_variables_stand_for_their_parameters(form, tmp_path):
    model, x = Small(), jnp.ones((2, 5))
    variables = model.init(jax.random.key(0), x)
    given = form(variables)
    peft = jpeft.apply(given, "lora", rank=2)
    plain = jpeft.apply(variables["params"], "lora", rank=2)
    chex.assert_trees_all_equal(peft.adapter, plain.adapter)  # with the head, which is found at the top only
    np.testing.assert_array_equal(jpeft.wrap(model.apply)(peft, x), model.apply(variables, x))
    assert jpeft.summary(peft) == jpeft.summary(plain)
    np.testing.assert_array_equal(model.apply({"params": jpeft.merge(peft)}, x), model.apply(variables, x))
    jpeft.save(tmp_path / "adapter", peft)
    assert jpeft.load(tmp_path / "adapter", given).params.keys() == {"dense", "classifier"}
    assert plain.replace(params=given).params.keys() == {"dense", "classifier"}
    assert jpeft.kernel_axes(model, given, x) == jpeft.kernel_axes(model, variables["params"], x)
    assert movement(given, given).values.keys() == {"dense", "classifier"}


def test_statistics_of_variables_fit_the_parameters():
    model, x = Small(), jnp.ones((2, 5))
    variables = model.init(jax.random.key(0), x)
    stats = fisher(lambda variables, batch: model.apply(variables, batch), variables, [x], mode="expected")
    peft = jpeft.apply(variables, "fish_mask", stats=stats, sparsity=0.5)
    assert jpeft.wrap(model.apply)(peft, x).shape == (2, 3)


def test_other_collections_are_named(images):
    model, variables = images
    with pytest.warns(UserWarning, match=r"no other collections \(batch_stats\).*collections={'batch_stats': variables\['batch_stats'\]}"):
        peft = jpeft.apply(variables, "bitfit")
    out = jpeft.wrap(model.apply)(peft, IMAGES, collections={"batch_stats": variables["batch_stats"]})
    np.testing.assert_allclose(out, model.apply(variables, IMAGES), atol=1e-5)


def test_what_may_be_variables_or_parameters_is_refused():
    variables = Small().init(jax.random.key(0), jnp.ones((2, 5)))
    for others in ({"lora": {}}, {"encoder": {"kernel": jnp.ones((2, 2))}}):
        with pytest.raises(ValueError, match=r"give variables\['params'\]"):
            jpeft.apply({**variables, **others}, "lora")
    # A leaf of that name makes no variables.
    assert jpeft.apply({"params": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "bitfit").params.keys() == {"params", "bias"}


@pytest.mark.parametrize("verb", ["merge", "summary", "fold", "penalty", "advance"])
def test_verbs_that_take_a_peft_say_so(verb):
    with pytest.raises(ValueError, match=rf"jpeft\.{verb} takes a Peft, .* and was given a dict"):
        inspect.unwrap(getattr(jpeft, verb))({"params": {}})  # without the tests' own check of types


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_kernel_axes_of_a_model_with_running_means(images, train):
    model, variables = images
    found = dict(jpeft.kernel_axes(model, variables, IMAGES, train=train))
    assert found == dict(jpeft.kernel_axes(model, variables["params"], IMAGES, train=train))
    assert found["block/first/kernel"] == KernelAxes((), (0, 1, 2), (3,))
    assert jax.eval_shape(lambda v: jpeft.kernel_axes(model, v, IMAGES) and v, variables)


def test_kernels_of_convolutions_are_known(images):
    model, variables = images
    shapes = {path: leaf.shape for path, leaf in jpeft.flatten(variables["params"]).items() if path.endswith("kernel")}
    told = dict(jpeft.kernel_axes(model, variables, IMAGES))
    assert told.keys() == shapes.keys()
    for path, axes in told.items():
        assert axes_of(path, shapes[path]) == axes, path
    assert axes_of("volume/kernel", (2, 2, 2, 8, 8)) == KernelAxes((), (0, 1, 2, 3), (4,))
    # A stack of convolutions, and kernels with four axes that are none.
    assert axes_of("layers/conv/kernel", (6, 3, 3, 8, 8)) == KernelAxes((0,), (1, 2, 3), (4,))
    for path, shape in (("qkv/kernel", (16, 3, 2, 8)), ("layers/experts/kernel", (2, 2, 8, 16)), ("mix/kernel", (4, 8, 4, 8))):
        with pytest.raises(ValueError, match="is not known"):
            axes_of(path, shape)


@pytest.mark.parametrize(("method", "more"), [("lora", {"rank": 2}), ("dora", {"rank": 2}), ("ia3", {"feedforward": None})])
def test_methods_on_convolutions(images, method, more):
    model, variables = images
    kernels = [path for path, leaf in jpeft.flatten(variables["params"]).items() if path.endswith("kernel") and leaf.ndim > 2]
    peft = jpeft.apply(variables["params"], method, target=kernels, **more)
    peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.1, peft.adapter))
    others = {"batch_stats": variables["batch_stats"]}
    merged = model.apply({"params": jpeft.merge(peft), **others}, IMAGES)
    np.testing.assert_allclose(jpeft.wrap(model.apply)(peft, IMAGES, collections=others), merged, rtol=1e-4, atol=1e-4)
    assert np.abs(merged - model.apply(variables, IMAGES)).max() > 1e-3


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3, 4, 2), (5, 3, 4, 2, 2)])
def test_the_rule_that_an_error_suggests_can_be_used(shape):
    with pytest.raises(ValueError, match="is not known") as error:
        axes_of("mixer/kernel", shape)
    rule = str(error.value).split("axes=", 1)[1].split(", or let", 1)[0]
    rules = eval(rule, {"jpeft": jpeft})
    assert axes_of("mixer/kernel", shape, rules) == rules[0][1]


# --- heads ------------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A transformer for texts: with a head of so many outputs, or bare, or with a head for words."""

    outputs: int | None
    layers: int = 2

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8)(ids)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        return x if self.outputs is None else nn.Dense(self.outputs)(x)


class TwoHeads(nn.Module):
    """Convolutions flattened into two heads of one width."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(2, name="policy")(x), nn.Dense(2, name="value")(x)


def shapes_of(model, *inputs):
    """The parameters of a model as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def test_heads_under_other_names_are_found():
    ids = jnp.zeros((1, 4), int)
    for layers in (1, 2):
        assert unknown_heads(shapes_of(Words(2, layers), ids)) == [f"Dense_{2 * layers}"]
    assert unknown_heads(shapes_of(TwoHeads(), jnp.ones((1, 4, 4, 3)))) == ["policy", "value"]


def test_no_head_is_seen_where_there_is_none():
    ids = jnp.zeros((1, 4), int)
    assert unknown_heads(shapes_of(Words(None), ids)) == []  # a bare encoder
    assert unknown_heads(shapes_of(Words(11), ids)) == []  # a language model
    assert unknown_heads(shapes_of(Words(8), ids)) == []  # a projection
    assert unknown_heads(shapes_of(nn.Dense(3), jnp.ones((1, 5)))) == []  # a single layer
    shapes = {f"block_{i}/{name}/kernel": shape for i in range(2) for name, shape in (("up", (8, 8)), ("router", (8, 5)))}
    assert unknown_heads({path: ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}) == []
    one_block = {"mixer/in/kernel": (8, 24), "mixer/out/kernel": (8, 8), "ln/scale": (8,)}  # queries, keys and values in one
    assert unknown_heads({path: ShapeDtypeStruct(shape, "float32") for path, shape in one_block.items()}) == []
    assert unknown_heads(shapes_of(Small(), jnp.ones((1, 5)))) == []  # `classifier` is known


def test_apply_says_which_head_to_give():
    params = Words(3).init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    with pytest.warns(UserWarning, match="'Dense_4' may be one.*give head='Dense_4'"):
        jpeft.apply(params, "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {"kernel", "bias"} == jpeft.apply(params, "lora", head="Dense_4").adapter["Dense_4"].keys()
        jpeft.apply(params, "lora", head=None)
        jpeft.apply(params, "freeze", target=".*")  # trains all of it
        jpeft.apply(params, jpeft.chain(a=jpeft.lora(head="Dense_4"), b=jpeft.bitfit()))
    with pytest.warns(UserWarning, match="may be one"):
        jpeft.apply(params, jpeft.chain(a=jpeft.lora(head=None), b=jpeft.bitfit()))
