"""Where methods put themselves in models that nobody here wrote, by the names and shapes of their parameters."""

import re

import jax
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from layout_families import FAMILIES
from layout_trees import leaves as leaves_of

import jpeft
from jpeft import layouts
from jpeft.tree.head import head_leaves

FOREIGN = [
    (name, form)
    for name, forms in {
        "ViT (big_vision)": ("numbered", "stacked"),
        "ViT (vision_transformer)": ("numbered",),
        "lm1b (flax)": ("numbered",),
        "t5x": ("numbered",),
        "t5x (scalable)": ("numbered", "stacked-1"),
        "Gemma 2 (google)": ("numbered",),
        "Llama (EasyLM)": ("numbered",),
        "octo": ("numbered",),
        "MaxText": ("stacked-1",),
        "ViT (bonsai)": ("numbered",),
        "Qwen3 (bonsai)": ("numbered",),
    }.items()
    for form in forms
]


def base(name, form):
    return abstract(FAMILIES[name].shapes(form))


def abstract(shapes):
    return jpeft.unflatten({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})


def apply(params, method, **options):
    return jax.eval_shape(lambda params: jpeft.apply(params, method=method, **options), params)


def modules(peft):
    """The modules with a bottleneck."""
    return {path.split("/+/")[0] for path in jpeft.flatten(peft.adapter) if "/+/" in path}


def owners(family, form, *roles):
    return {path.rpartition("/")[0] for role in roles for path in family.expected(role, form)}


def replaced(peft):
    """The leaves that stand in the place of leaves of the base, without those of the head."""
    heads = head_leaves(peft.params, "auto")
    return {path for path in jpeft.flatten(peft.adapter) if path in jpeft.flatten(peft.params) and path not in heads}


@pytest.mark.parametrize(("name", "form"), FOREIGN)
def test_bottlenecks_stand_after_attention_and_feed_forward(name, form):
    family, params = FAMILIES[name], base(name, form)
    both = owners(family, form, "@attention_out", "@ffn_out")
    assert modules(apply(params, "adapter")) == both | owners(family, form, "@cross_attention_out")
    assert modules(apply(params, "compacter", size=4)) == both
    assert modules(apply(params, "pfeiffer")) == family.expected("@block", form)
    if family.expected("@ffn", form):
        assert modules(apply(params, "parallel_adapter")) == family.expected("@ffn", form)
    else:
        with pytest.raises(ValueError, match="no parameter of the model has this role .*Candidates"):
            apply(params, "parallel_adapter")


@pytest.mark.parametrize(("name", "form"), FOREIGN)
def test_selective_methods_choose_leaves(name, form):
    family, params = FAMILIES[name], base(name, form)
    far = {leaf for role in ("@ffn_in", "@ffn_out") for leaf in family.expected(role, form)}
    if any(len(jpeft.flatten(params)[leaf].shape) > 2 + (form != "numbered") for leaf in far):
        with pytest.raises(ValueError, match="is no kernel with one axis of inputs and one of outputs"):
            apply(params, "far")
    else:
        biases = {re.sub("kernel$", "bias", leaf) for leaf in far} & jpeft.flatten(params).keys()
        assert replaced(apply(params, "far")) == far | biases
    biases = {path for path in jpeft.flatten(params) if path.endswith("/bias")} - head_leaves(params, "auto").keys()
    if biases:
        assert replaced(apply(params, "bitfit")) == biases
    else:
        with pytest.raises(ValueError, match="no bias parameters"):
            apply(params, "bitfit")


@pytest.mark.parametrize(("name", "form"), FOREIGN)
def test_freeze_trains_one_whole_layer(name, form):
    family, params = FAMILIES[name], base(name, form)
    peft, leaves = apply(params, "freeze", top=1), jpeft.flatten(params)
    adapter = jpeft.flatten(peft.adapter)
    stack = max((stack for stack, _ in layouts.blocks(params)), key=lambda stack: sum(leaves[path].size for path in stack.leaves))
    inside = {path for path in adapter if path in stack.leaves}
    assert inside == {path for path, number in stack.leaves.items() if number in (None, 1)}
    if stack.axis is not None:
        assert {adapter[path].shape[stack.axis] for path in inside} == {1}
    others = {path for other, _ in layouts.blocks(params) for path in other.leaves} - stack.leaves.keys()
    assert not others & adapter.keys()  # "also" takes norms outside all stacks
    assert family.expected("@final_norm", form) <= adapter.keys()


def test_summary_shows_placement_by_block():
    params = base("ViT (big_vision)", "numbered")
    (placed,) = jpeft.summary(apply(params, "adapter", train_norms=False)).placement
    assert placed == ("Transformer/encoderblock", "all 2", ("MlpBlock_0/Dense_1", "MultiHeadDotProductAttention_0/out"))
    summary = jpeft.summary(apply(params, "adapter", target=".*encoderblock_1/MlpBlock_0/Dense_1/kernel", train_norms=False))
    assert [entry[1:] for entry in summary.placement] == [("0", ()), ("1", ("MlpBlock_0/Dense_1",))]
    assert "blocks of Transformer/encoderblock, 0: nothing" in str(summary)
    assert "note: the blocks of 'Transformer/encoderblock' differ" in str(summary)
    stacked = jpeft.summary(apply(base("MaxText", "stacked-1"), "freeze", top=1))
    assert [entry.blocks for entry in stacked.placement] == ["0", "1"]


# --- blocks that follow no naming scheme -------------------------------------------------------------------------------------------------

OUTSIDE = "tok/embedding V,D\nln_out rms\ntop D>C"
BLOCKS = {
    "odd names": ("n rms\nmix/{q,k,v,o} D>D\nwide/a D>F\nwide/b F>D", "mix/o", "wide/b"),
    "in the block itself": ("n rms\n{wq,wk,wv,wo} D>D\n{w1,w3} D>F\nw2 F>D", "wo", "w2"),
    "heads apart": ("n rms\nCausalAttn_0/{query,key,value} D>N,K\nCausalAttn_0/out N,K>D\nMlp/{in} D>F\nMlp/back F>D",
                    "CausalAttn_0/out", "Mlp/back"),
    "queries, keys and values in one": ("n norm\nattend/qkv D>3D\nattend/proj D>D\nff/fc1 D>F\nff/fc2 F>D", "attend/proj", "ff/fc2"),
    "few keys": ("n rms\nself_attention/q D>D\nself_attention/{k,v} D>K\nself_attention/dense D>D\nfeed/{up,gate} D>F\nfeed/down F>D",
                 "self_attention/dense", "feed/down"),
    "output called wo": ("n rms\nMultiHeadAttention_0/{wq,wk,wv,wo} D>D\nFeedForward_0/{w1,w3} D>F\nFeedForward_0/w2 F>D",
                         "MultiHeadAttention_0/wo", "FeedForward_0/w2"),
}  # fmt: skip


def tree_of(block, form, count=3):
    """A model of such blocks in a container of an unknown name."""
    shapes = dict(leaves_of(OUTSIDE))
    for path, shape in leaves_of(block).items():
        if form == "numbered":
            shapes |= {f"cell_{i}/{path}": shape for i in range(count)}
        else:
            axis = int(form.removeprefix("stacked-")) if "-" in form else 0
            shapes[f"cells/{path}"] = (*shape[:axis], count, *shape[axis:])
    return abstract(dict(sorted(shapes.items())))


@pytest.mark.parametrize("form", ["numbered", "stacked", "stacked-1"])
@pytest.mark.parametrize("name", BLOCKS)
def test_unknown_blocks_are_read_by_structure(name, form):
    block, attention, feed_forward = BLOCKS[name]
    params = tree_of(block, form)
    ((stack, layout),) = layouts.blocks(params)
    assert (stack.count, layout.name) == (3, "structure")
    prefixes = [f"cell_{i}" for i in range(3)] if form == "numbered" else ["cells"]
    assert modules(apply(params, "adapter")) == {f"{prefix}/{end}" for prefix in prefixes for end in (attention, feed_forward)}
    assert list(head_leaves(params, "auto")) == ["top/bias", "top/kernel"]
    trained = {path for path in replaced(apply(params, "freeze", top=1)) if path.startswith("cell")}
    assert trained == {f"{prefixes[-1]}/{path}" for path in leaves_of(block)}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "n rms\nx/{alpha,beta,gamma,delta} D>D\ny/{i} D>F\ny/j F>D",
            r"Found: 'y/j/kernel'\. Kernels without a role: 'x/alpha/kernel' \(12, 12\)",
        ),
        ("n rms\nattn/{a,b,c,d} D>D\nmlp/{fc1} D>F\nmlp/fc2 F>D", r"Kernels without a role: 'attn/a/kernel'.*target=\["),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_read_are_refused(block, message):
    params = tree_of(block, "numbered")
    for method in ("adapter", "compacter"):
        with pytest.raises(ValueError, match=message):
            apply(params, method)
    assert modules(apply(params, "adapter", target=["delta", "y/j"] if "delta" in block else ["attn/d", "mlp/fc2"]))


def test_cross_attention_that_no_name_tells_is_refused():
    attention = "{{query,key,value}} D>N,K\n{0}/out N,K>D"
    block = f"n norm\nSelfAttention_0/{attention.format('SelfAttention_0')}\nCrossAttn_0/{attention.format('CrossAttn_0')}\n"
    params = tree_of(f"{block}Mlp_0/Dense_0 D>F\nMlp_0/Dense_1 F>D", "numbered")
    with pytest.raises(ValueError, match="Kernels without a role: 'CrossAttn_0/key/kernel'"):
        apply(params, "adapter")


# --- stacks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"mlp/wi_0/kernel": (8, 16), "mlp/wi_1/kernel": (8, 16), "mlp/wo/kernel": (16, 8)}, []),  # layers of one kernel are no stack
        ({"dense/kernel": (8, 8), "dense/bias": (8,), "norm/scale": (8,), "norm/bias": (8,)}, []),  # the width is shared by chance
        ({"cell/a/kernel": (8, 8, 8), "cell/b/kernel": (8, 8, 8)}, []),
        ({"cell/norm/scale": (3, 8), "cell/a/kernel": (3, 8, 8)}, [("cell", 3, 0)]),
        ({"cell/norm/scale": (8, 3), "cell/a/kernel": (8, 3, 16), "head/kernel": (8, 2)}, [("cell", 3, 1)]),
        ({"cell/norm/scale": (8, 3), "cell/a/kernel": (8, 16, 3), "cell/b/kernel": (16, 8, 3)}, [("cell", 3, -1)]),
        ({"attn/query/kernel": (8, 2, 4), "attn/query/bias": (2, 4), "attn/key/kernel": (8, 2, 4), "attn/key/bias": (2, 4)}, []),
        ({"moe/experts/wi/kernel": (4, 8, 16), "moe/experts/wi/bias": (4, 16), "moe/experts/wo/kernel": (4, 16, 8)}, []),
        ({"outer/layers/n/scale": (3, 8), "outer/layers/a/kernel": (3, 8, 8)}, [("outer/layers", 3, 0)]),
        ({f"{side}/layers/{leaf}": (3, 8) for side in "ab" for leaf in ("n/scale", "m/scale")}, [("a/layers", 3, 0), ("b/layers", 3, 0)]),
        ({f"block{i}/{leaf}/kernel": (8, 8) for i in range(2) for leaf in "ab"}, [("block", 2, None)]),
        ({f"x/attn{i}/{leaf}/kernel": (8, 8) for i in (1, 2) for leaf in ("q", "o")}, []),
        ({f"t_{i}/layers_{j}/{leaf}/kernel": (8, 8) for i in range(2) for j in range(3) for leaf in "ab"}, [("t", 2, None)]),
    ],
)  # fmt: skip
def test_stacks_are_found_by_structure(shapes, found):
    assert [(stack.path, stack.count, stack.axis) for stack in layouts.stacks(shapes) if stack.count > 1] == found


def test_parts_of_a_single_block_are_no_layers():
    attention = {f"SelfAttention_{i}/{name}/kernel": (8, 8) for i in range(2) for name in ("query", "key", "value", "out")}
    shapes = {f"block_0/{path}": shape for path, shape in {**attention, "Mlp_0/up/kernel": (8, 16), "Mlp_0/down/kernel": (16, 8)}.items()}
    assert [(stack.path, stack.count) for stack in layouts.stacks(shapes)] == [("block", 1)]


# --- methods under nn.scan on any axis ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="ln1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(h, h)
        h = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm(name="ln2")(x)))
        return x + nn.Dense(8, name="down")(h), None


class Net(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name="head")(stack(name="things")(x, None)[0])


METHODS = {
    "adapter": {"size": 2},
    "pfeiffer": {"size": 2},
    "compacter": {"size": 4},
    "parallel_adapter": {"size": 2, "target": "(?P<block>things)/down/kernel"},
    "freeze": {"top": 1},
    "far": {},
    "dora": {"rank": 2},
    "ia3": {"target": ".*(up|down)/kernel", "feedforward": None},
}


def on_axis(params, axis):
    """The same model with its layers on another axis."""
    move = lambda path, leaf: jnp.moveaxis(leaf, 0, axis) if path.startswith("things/") else leaf
    return jpeft.unflatten({path: move(path, leaf) for path, leaf in jpeft.flatten(params).items()})


@pytest.mark.parametrize("axis", [1, -1])
def test_methods_follow_the_axis_of_the_layers(axis):
    """With the same values on another axis, a method has the same outputs as on the first."""
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    params = jax.jit(Net(0).init)(jax.random.key(0), x)["params"]
    for method, options in METHODS.items() if axis == 1 else [("adapter", METHODS["adapter"]), ("compacter", METHODS["compacter"])]:
        first, other = (jpeft.apply(base, method=method, **options) for base in (params, on_axis(params, axis)))
        if method == "far":
            first, other = (jpeft.advance(nudged(peft, at)) for peft, at in ((first, 0), (other, axis)))
        adapter = nudged(first, 0).adapter
        moved = jpeft.flatten(on_axis(adapter, axis))
        assert {path: leaf.shape for path, leaf in moved.items()} == {k: v.shape for k, v in jpeft.flatten(other.adapter).items()}, method
        out = jpeft.wrap(Net(0).apply)(first.replace(adapter=adapter), x)
        got = jpeft.wrap(Net(axis).apply)(other.replace(adapter=jpeft.unflatten(moved)), x)
        assert jnp.abs(out - got).max() < 1e-4 * jnp.abs(out).max(), method


def nudged(peft, axis):
    """The adapter with every trained leaf moved, in the same way wherever its layers are."""

    def nudge(path, leaf):
        if path.endswith("indices"):
            return leaf
        at = axis if path.startswith("things/") else 0
        wave = jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype) + 1).reshape(jnp.moveaxis(leaf, at, 0).shape)
        return leaf + 0.1 * jnp.moveaxis(wave, 0, at)

    return peft.replace(adapter=jpeft.unflatten({path: nudge(path, leaf) for path, leaf in jpeft.flatten(peft.adapter).items()}))


def test_rules_of_sharding_are_written_for_one_layer():
    mesh = jpeft.sharding.abstract_mesh(8, fsdp=4, tensor=2)
    rules = ((".*query/kernel", P("fsdp", None, "tensor")), (".*wo/kernel", P("tensor", "fsdp")))
    placed = jpeft.flatten(jpeft.sharding.shardings(base("MaxText", "stacked-1"), mesh, rules))
    assert placed["decoder/layers/self_attention/query/kernel"].spec == P("fsdp", None, None, "tensor")
    assert placed["decoder/layers/mlp/wo/kernel"].spec == P("tensor", None, "fsdp")


# --- heads -------------------------------------------------------------------------------------------------------------------------------


def mlp(head, outputs=4):
    layer = lambda i: {f"layer_{i}": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}
    return layer(0) | layer(1) | {head: {"kernel": jnp.zeros((8, outputs)), "bias": jnp.zeros(outputs)}}


@pytest.mark.parametrize("head", ["head", "output_projection", "logits_dense", "policy_head", "prediction"])
def test_heads_of_usual_names_are_trained(head):
    for method in ("freeze", "bitfit", "lora"):
        adapter = jpeft.flatten(jpeft.apply(mlp(head), method=method, **({"target": "layer_.*"} if method == "lora" else {})).adapter)
        assert {f"{head}/kernel", f"{head}/bias"} <= adapter.keys()


def test_a_head_of_words_is_none():
    params = abstract({"tok/embedding": (23, 8), "Dense_0/kernel": (8, 8), "logits_dense/kernel": (8, 23)})
    assert head_leaves(params, "auto") == {}


@pytest.mark.parametrize(("method", "options"), [("freeze", {"top": 1}), ("bitfit", {}), ("lora", {"target": "layer_.*/kernel"})])
def test_a_frozen_output_of_zeros_is_refused(method, options):
    message = r"the output layer '(head|Dense_9)/kernel' is all zeros and would stay so.*Train it along, as a new head: head='"
    with pytest.raises(ValueError, match=f"{method}: {message}"):
        jpeft.apply(mlp("head"), method=method, head=None, **options)
    with pytest.raises(ValueError, match=message):
        jpeft.apply(mlp("head", outputs=8), method=method, head=None, **options)
    with pytest.warns(UserWarning, match="may be one"), pytest.raises(ValueError, match=message):
        jpeft.apply(mlp("Dense_9"), method=method, **options)
    jpeft.apply(mlp("Dense_9"), method=method, head="Dense_9", **options)


def test_zeros_elsewhere_are_legal():
    residual = mlp("head")
    residual["head"]["kernel"] = jnp.ones((8, 4))
    residual["layer_1"]["kernel"] = jnp.zeros((8, 8))
    assert jpeft.apply(residual, method="bitfit", head=None)
    two = mlp("head") | {"value": {"kernel": jnp.ones((8, 3))}}  # a gradient passes the other output
    assert jpeft.apply(two, method="lora", target="layer_.*", head=None)
    assert jpeft.apply(mlp("head"), method="lora", head=None)  # LoRA's update of the head is trained
    jax.eval_shape(lambda params: jpeft.apply(params, method="bitfit", head=None), mlp("head"))


def test_adapters_of_before_load_without_the_head(tmp_path):
    """An adapter that was saved when a head of this name was not known trains none of it whole."""
    params = mlp("head")
    params["head"]["kernel"] = jnp.ones((8, 4))
    old = jpeft.apply(params, method="lora", rank=2, head=None)
    jpeft.save(tmp_path / "out", old.replace(method=old.method.replace(head="auto")))
    there = jpeft.load(tmp_path / "out", params)
    assert there.method.head is None
    assert jpeft.flatten(there.adapter).keys() == jpeft.flatten(old.adapter).keys()
