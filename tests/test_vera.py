"""VeRA against its equation and HF PEFT; counts, the matrices that are shared, cost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import added_flops, noised

import jpeft
from jpeft.models import BertConfig, BertModel, abstract_params


def test_equals_its_equation_and_hf_peft():
    """Two layers of different widths, with the matrices that HF drew."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    twin = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 5))
    twin = hf.get_peft_model(twin, hf.VeraConfig(r=6, target_modules=["0", "1"], d_initial=0.2))
    named = {name: leaf for name, leaf in twin.named_parameters() if leaf.requires_grad}
    for leaf in named.values():
        leaf.data += 0.3 * torch.randn(leaf.shape)
    x = torch.randn(7, 8)
    y = twin(x)
    torch.sin(y).sum().backward()
    state = {name: leaf.numpy() for name, leaf in hf.get_peft_model_state_dict(twin).items()}
    layers = [layer.get_base_layer() for layer in twin.base_model.model]
    params = {str(i): {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()} for i, layer in enumerate(layers)}

    def adapter(numbers, a, b):
        beside = lambda i: {name: jnp.asarray(numbers(f"base_model.model.{i}.vera_lambda_{name}")) for name in ("d", "b")}
        return {"+": {"a": jnp.asarray(a.T), "b": jnp.asarray(b.T)}, **{i: {"kernel": beside(i)} for i in ("0", "1")}}

    peft = jpeft.apply(jax.tree.map(jnp.asarray, params), "vera", rank=6, d_initial=0.2, head=None)
    a, b = state["base_model.vera_A"], state["base_model.vera_B"]
    own = adapter(state.get, a, b)
    chex.assert_trees_all_equal_shapes(own, peft.adapter)
    peft, hidden = peft.replace(adapter=own), x.numpy()
    for i, (ins, outs) in enumerate(((8, 12), (12, 5))):
        d, by = (state[f"base_model.model.{i}.vera_lambda_{name}"] for name in "db")
        hidden = hidden @ (params[str(i)]["kernel"] + a[:, :ins].T @ np.diag(d) @ b[:outs].T @ np.diag(by)) + params[str(i)]["bias"]
    want = y.detach().numpy()
    np.testing.assert_allclose(hidden, want, atol=1e-5)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="1")(nn.Dense(12, name="0")(x))

    run, x = jpeft.wrap(Two().apply), jnp.asarray(x.numpy())
    np.testing.assert_allclose(run(peft, x), want, atol=1e-5)
    np.testing.assert_allclose(Two().apply({"params": jpeft.merge(peft)}, x), want, atol=1e-5)
    grads = jax.grad(lambda adapter: jnp.sin(run(peft.replace(adapter=adapter), x)).sum())(peft.adapter)
    expected = adapter(lambda name: named[f"{name}.default"].grad.numpy(), 0 * a, 0 * b)
    chex.assert_trees_all_close(grads, expected, atol=1e-4, rtol=1e-4)


def test_counts_of_the_paper():
    """RoBERTa-base with rank 1024 on query and value: 43,008 trained; the matrices are stored once."""
    for scan in (False, True):
        params = abstract_params(BertModel(BertConfig.roberta_base(scan=scan), pooling=False))
        s = jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "vera", rank=1024, target=["query", "value"]), params))
        assert (s.trained, s.stored, s.changed) == (43_008, 43_008 + 2 * 768 * 1024, 24 * 768 * 768)


def test_the_seed_alone_draws_the_matrices():
    params = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    drawn = [
        jpeft.apply(params, "vera", rank=3, seed=seed, key=jax.random.key(i), head=None).adapter["+"] for i, seed in enumerate((0, 0, 1))
    ]
    chex.assert_trees_all_equal(drawn[0], drawn[1])
    assert (drawn[0]["a"] != drawn[2]["a"]).all()
    assert jnp.abs(drawn[0]["a"]).max() <= 1.0  # sqrt(6 / 6)


def test_in_a_chain():
    """Two of them, of other ranks, each with its own matrices; merged as they run."""
    params = {"up": {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}}
    peft = jpeft.apply(params, jpeft.chain(one=jpeft.vera(rank=2, head=None), two=jpeft.vera(rank=3, seed=1, head=None)))
    peft = peft.replace(adapter=noised(peft.adapter))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="up")(x)

    x = jax.random.normal(jax.random.key(0), (3, 6))
    chex.assert_trees_all_close(jpeft.wrap(Model().apply)(peft, x), Model().apply({"params": jpeft.merge(peft)}, x), atol=1e-5)


def test_a_step_has_no_gradient_of_the_matrices():
    """The gradient of b alone, so less than LoRA of the same rank."""
    assert added_flops("vera", rank=16) < added_flops("lora", rank=16)
