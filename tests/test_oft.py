"""OFT against its equation and HF PEFT; counts, cost, blocks that do not fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops

import jpeft
from jpeft.reparameterized import rotation
from jpeft.reparameterized.oft import nearest_divisor


def leaves(tensors):
    return {"q": tensors["oft_R.weight"]}


def block_diagonal(blocks, count):
    out = np.zeros((count * blocks.shape[1],) * 2)
    for i in range(count):
        at = slice(i * blocks.shape[1], (i + 1) * blocks.shape[1])
        out[at, at] = blocks[i % len(blocks)]
    return out


@pytest.mark.parametrize(
    ("options", "of_hf"),
    [
        ({"block_size": 8}, {"oft_block_size": 8}),
        ({"block_size": 4, "terms": None}, {"oft_block_size": 4, "use_cayley_neumann": False}),
        (
            {"block_num": 6, "terms": 3, "block_share": True},
            {"r": 6, "oft_block_size": 0, "num_cayley_neumann_terms": 3, "block_share": True},
        ),
        ({"block_size": 24, "terms": 2}, {"oft_block_size": 24, "num_cayley_neumann_terms": 2}),
    ],
)
def test_equals_its_equation_and_hf_peft(options, of_hf):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.OFTConfig(**of_hf, target_modules=["1"]), noise=0.2)
    entries = found.tensors["oft_R.weight"]
    size = options.get("block_size", 4)
    q = np.zeros((len(entries), size, size))
    rows, columns = np.triu_indices(size, 1)
    q[:, rows, columns] = entries
    q -= q.swapaxes(1, 2)
    one = np.eye(size)
    turned = {
        None: lambda: (one - q) @ np.linalg.inv(one + q),
        2: lambda: one + 2 * q,
        3: lambda: one + 2 * q + 2 * q @ q + q @ q @ q,
        5: lambda: one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q,
    }[options.get("terms", 5)]()
    whole = block_diagonal(turned, 24 // size)
    np.testing.assert_allclose(found.x @ whole @ found.kernel + found.bias, found.y, atol=1e-5)
    assert_equals_hf(jpeft.oft(**options), found, leaves)


@pytest.mark.parametrize("share", [False, True])
def test_coft_equals_hf_peft(share):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.OFTConfig(oft_block_size=6, coft=True, eps=0.5, block_share=share, target_modules=["1"]), noise=0.05)
    # HF PEFT writes the shortened entries over the trained ones and differentiates what comes after.
    assert_equals_hf(jpeft.oft(block_size=6, coft=True, eps=0.5, block_share=share), found, leaves, grads=False)


def test_rows_of_tables_are_rotated():
    """As HF PEFT does: the rows of an embedding times R, in lookups and in scores."""
    hf, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    twin = hf.get_peft_model(torch.nn.Sequential(torch.nn.Embedding(7, 8)), hf.OFTConfig(oft_block_size=4, target_modules=["0"]))
    weight = next(leaf for leaf in twin.parameters() if leaf.requires_grad)
    weight.data += 0.2 * torch.randn(weight.shape)
    ids = torch.tensor([[1, 3, 6]])
    table = next(leaf for name, leaf in twin.named_parameters() if "base_layer" in name)

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 8, name="embed")
            return embed(ids), embed.attend(embed(ids))

    params = {"embed": {"embedding": jnp.asarray(table.detach().numpy())}}
    peft = jpeft.apply(params, "oft", block_size=4, target=["embed"], head=None)
    peft = peft.replace(adapter={"embed": {"embedding": {"q": jnp.asarray(weight.detach().numpy())}}})
    rows, scores = jpeft.wrap(Tied().apply)(peft, jnp.asarray(ids.numpy()))
    np.testing.assert_allclose(rows, twin(ids).detach().numpy(), atol=1e-5)
    chex.assert_trees_all_close((rows, scores), Tied().apply({"params": jpeft.merge(peft)}, jnp.asarray(ids.numpy())), atol=1e-5)


def test_rotations_are_orthogonal():
    q = rotation.skew(0.3 * jax.random.normal(jax.random.key(0), (3, 28)), 8)
    exact = rotation.cayley(q) + jnp.eye(8)[None]
    chex.assert_trees_all_close(exact @ exact.swapaxes(1, 2), jnp.broadcast_to(jnp.eye(8), (3, 8, 8)), atol=1e-5)
    # The series turns the other way round; it comes nearer with each term.
    distance = [jnp.abs(rotation.neumann(0.2 * q, terms) - rotation.cayley(-0.2 * q)).max() for terms in (2, 4, 5, 8)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-3


def test_counts():
    params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)}}
    for options, count in (({}, 24 * 496), ({"block_share": True}, 496), ({"block_num": 12}, 12 * 2016)):
        assert jpeft.summary(jax.eval_shape(lambda p, options=options: jpeft.apply(p, "oft", **options), params)).trained == count


def test_blocks_that_do_not_fit_are_said_once():
    shape = lambda *sizes: {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}
    params = {"up": shape(48, 64), "down": shape(64, 48), "small": shape(16, 4)}
    with pytest.warns(
        UserWarning, match="oft: block_size=32 does not divide the inputs of 'up/kernel'.* 'up/kernel', with 48 inputs, has 2"
    ) as said:
        peft = jax.eval_shape(lambda p: jpeft.apply(p, "oft", head=None), params)
    assert len(said) == 1
    assert {name: leaves["kernel"]["q"].shape for name, leaves in peft.adapter.items()} == {
        "up": (2, 276),
        "down": (2, 496),
        "small": (1, 120),
    }
    layer = pytest.importorskip("peft.tuners.oft.layer")
    for ins in (30, 48, 127, 768):
        for wanted in (2, 5, 7, 32, 100, 1000):
            if ins % wanted:
                assert nearest_divisor(ins, wanted) == layer.OFTLayer.adjust_oft_parameters(None, ins, wanted), (ins, wanted)


@pytest.mark.parametrize(
    ("ins", "options", "message"),
    [
        (6, {"block_size": 1}, "block_size=1 cuts the 6 inputs of 'up/kernel' into blocks of 1, which cannot turn. .* such as 2 or 3, or"),
        (7, {"block_size": 3}, "block_size=3 cuts the 7 inputs .* such as 7, or leave it out"),
        (8, {"block_num": 8}, "block_num=8 cuts the 8 inputs"),
        (1, {}, "block_size=32 cuts the 1 inputs of 'up/kernel' into blocks of 1, which cannot turn. Leave it out of the target"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not divide")
def test_blocks_of_one_are_refused(ins, options, message):
    """They have nothing to train."""
    params = {"up": {"kernel": jnp.ones((ins, 4))}}
    with pytest.raises(ValueError, match=f"oft: {message}"):
        jpeft.apply(params, jpeft.oft(head=None, **options))


def test_a_step_rotates_inputs():
    """Blocks of 16: 2 * 16 FLOPs a number of x for each of three products, a fourth of the layer's at width 128; no gradient of W."""
    rows, width = 1024, 128
    assert added_flops("oft", block_size=16) < 1.3 * 3 * 2 * 16 * rows * width
