"""AdaLoRA: its equation, its penalty, its budget against NumPy and HF PEFT's allocator, and what is saved once ranks have gone."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import MODELS, base, batch, noised
from test_train import bits, records
from test_weight_methods import KEY, MLP, _outputs_and_gradients, _torch_twin
from tiny_text import make_base

import jpeft
from jpeft.models import BertConfig, BertModel, abstract_params
from jpeft.reparameterized.rank_budget import Budget
from jpeft.training.config import TrainConfig
from jpeft.training.run import load_run
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train


@pytest.fixture(scope="module")
def mlp():
    model, x = MLP(), jax.random.normal(KEY, (40, 8))
    return model, noised(model.init(KEY, x)["params"]), x


# --- equation ---------------------------------------------------------------------------------------------------------------------------


def test_it_is_its_equation(mlp):
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.adalora(rank=3, target_rank=2, alpha=6.0))
    leaves = peft.adapter["up"]["kernel"]
    assert (leaves["e"] == 0).all()
    assert 0.01 < float(jnp.std(leaves["a"])) < 0.03
    peft = peft.replace(adapter=noised(peft.adapter))
    hidden, s, distances = np.array(x), 6.0 / (3 + 1e-5), []
    for name in ("up", "down"):
        a, b, e = (np.array(peft.adapter[name]["kernel"][leaf]) for leaf in "abe")
        hidden = hidden @ (np.array(params[name]["kernel"]) + s * a @ np.diag(e) @ b) + np.array(params[name]["bias"])
        hidden = np.tanh(hidden) if name == "up" else hidden
        distances += [np.linalg.norm(a.T @ a - np.eye(3)), np.linalg.norm(b @ b.T - np.eye(3))]
    np.testing.assert_allclose(jpeft.wrap(model.apply, peft.method)(peft.variables, x), hidden, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": jpeft.merge(peft)}, x), hidden, atol=1e-5)
    np.testing.assert_allclose(jpeft.penalty(peft), 0.5 * np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(jpeft.penalty(jpeft.Peft(params, {"m": peft.adapter}, jpeft.chain(m=peft.method))), jpeft.penalty(peft))
    with pytest.raises(ValueError, match=r"take jpeft.penalty\(peft\)"):
        peft.method.penalty(peft.adapter)


def test_the_penalty_of_a_stack_is_the_mean_over_its_kernels():
    peft = jpeft.apply(base("scan-mha"), method="adalora", rank=3, target_rank=2, total_steps=9, target=["query", "out"], orthogonal=1.0)
    mha = jax.tree.map(np.array, noised(peft.adapter)["layers"]["attn"]["mha"])
    distances = []
    for i in range(2):
        for name in ("query", "out"):
            a, b = mha[name]["kernel"]["a"][i], mha[name]["kernel"]["b"][i]
            a, b = a.reshape(-1, 3), b.reshape(3, -1)
            distances += [np.linalg.norm(a.T @ a - np.eye(3)), np.linalg.norm(b @ b.T - np.eye(3))]
    np.testing.assert_allclose(jpeft.penalty(peft.replace(adapter=noised(peft.adapter))), np.mean(distances), rtol=1e-5)


def test_a_penalty_of_orthogonal_factors_has_a_slope(mlp):
    _, params, _ = mlp
    peft = jpeft.apply(params, method="adalora", rank=2, target_rank=2, target=["up"])
    eye = {"a": jnp.eye(8, 2), "e": jnp.ones(2), "b": jnp.eye(2, 16)}
    peft = peft.replace(adapter=jpeft.tree.replace(peft.adapter, {f"up/kernel/{name}": leaf for name, leaf in eye.items()}))
    grads = jax.grad(lambda adapter: jpeft.penalty(peft.replace(adapter=adapter)))(peft.adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_counts():
    """r (in + out + 1) for each kernel of BERT-base's query and value."""
    params = abstract_params(BertModel(BertConfig()))
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method="adalora", rank=12, target=["query", "value"]), params)
    assert jpeft.summary(peft).trained == 24 * 12 * (768 + 768 + 1)


# --- budget -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(50, 150, 1, 120, 80), Budget(0, 7, 1, 864, 576), Budget(0, 1, 1, 3, 2), Budget(2, 40, 3, 5, 5)])
def test_a_compiled_step_has_the_budget_of_the_formula(budget):
    steps = range(1, budget.end + 4)
    got = jax.vmap(budget.at_traced)(jnp.arange(1, budget.end + 4))
    assert got.tolist() == [budget.at(step) for step in steps]
    assert budget.at(budget.end) == budget.last


class Allocator:
    """The budget of the paper, step by step in NumPy, on matrices {name: {"a", "e", "b"}} with the axes of a stack in front."""

    def __init__(self, method, steps, leaves):
        self.method, self.steps = method, steps
        self.means = {name: {leaf: [np.zeros_like(x), np.zeros_like(x)] for leaf, x in part.items()} for name, part in leaves.items()}
        self.first = sum(part["e"].size for part in leaves.values())
        self.last = method.target_rank * sum(part["e"][..., 0].size for part in leaves.values())
        self.kept = {name: np.ones(part["e"].shape, bool) for name, part in leaves.items()}

    def __call__(self, step, leaves, grads):
        """What a step keeps; `leaves` are those after the update."""
        method, begin, end = self.method, self.method.t_init, self.steps - self.method.t_final
        for name, part in leaves.items() if step < end else ():
            for leaf, value in part.items():
                importance, old = np.abs(value * grads[name][leaf]), self.means[name][leaf]
                old[0] = method.beta1 * old[0] + (1 - method.beta1) * importance
                old[1] = method.beta2 * old[1] + (1 - method.beta2) * np.abs(importance - old[0])
        if step > end:
            return self.kept
        if step <= begin or not (step % method.interval == 0 or step == end):
            return {name: np.ones_like(kept) for name, kept in self.kept.items()}
        budget = int((self.first - self.last) * (1 - (step - begin) / (end - begin)) ** 3 + self.last)
        scores = {}
        for name, means in self.means.items():
            score = {leaf: mean[0] * mean[1] for leaf, mean in means.items()}
            scores[name] = score["e"] + score["a"].mean(-2) + score["b"].mean(-1)
        order = np.sort(np.concatenate([each.ravel() for each in scores.values()]))
        threshold = order[self.first - budget - 1] if self.first > budget else -np.inf
        self.kept = {name: each > threshold for name, each in scores.items()}
        return self.kept


@pytest.mark.parametrize("over", ["adapter", "variables"])
def test_the_budget_is_that_of_numpy(over):
    """A stack with head axes, and kernels of a classifier; a step between two choices; random gradients."""
    method = jpeft.adalora(rank=5, target_rank=2, total_steps=14, t_init=2, t_final=3, interval=2, target=["query", "up"])
    peft = jpeft.apply(base("scan-mha"), method=jpeft.chain(bias=jpeft.bitfit(), ada=method) if over == "variables" else method)
    held = lambda tree: tree["ada"] if over == "variables" else tree

    def matrices(tree):
        layers = jax.tree.map(np.array, held(tree))["layers"]
        query, up = layers["attn"]["mha"]["query"]["kernel"], layers["up"]["kernel"]
        return {"query": {**query, "b": query["b"].reshape(2, 5, -1)}, "up": up}

    tx, tree = jpeft.optimizer(optax.sgd(1.0), peft, over=over), peft.variables if over == "variables" else peft.adapter
    state, step = tx.init(tree), jax.jit(tx.update)
    allocator = Allocator(method, 14, matrices(tree))
    for t in range(1, 18):
        grads = noised(jax.tree.map(jnp.zeros_like, tree), seed=t)
        updates, state = step(grads, state, tree)
        free = jax.tree.map(lambda leaf, grad: leaf - grad, tree, grads)
        kept, tree = allocator(t, matrices(free), matrices(grads)), optax.apply_updates(tree, updates)
        for name, part in matrices(tree).items():
            np.testing.assert_array_equal(part["e"] != 0, kept[name], err_msg=f"step {t}")
            np.testing.assert_allclose(part["a"], matrices(free)[name]["a"], rtol=1e-6)
    assert sum(part["e"].astype(bool).sum() for part in matrices(tree).values()) == 2 * 4
    assert int(state.rule["ada"].step if over == "variables" else state.rule.step) == 17
    with pytest.raises(ValueError, match="call tx.update"):
        tx.update(tree, state)


def test_the_ranks_are_those_of_hf_peft(mlp):
    """The same training, step by step, of HF PEFT with `update_and_allocate` and of ours."""
    hf = pytest.importorskip("peft")
    model, params, x = mlp
    total, rate = 12, 0.3
    method = jpeft.adalora(rank=4, target_rank=2, alpha=6.0, total_steps=total, t_init=2, t_final=4, orthogonal=0.0)
    peft = jpeft.apply(params, method=method)
    peft = peft.replace(adapter=noised(peft.adapter))
    given = dict(init_r=4, target_r=2, lora_alpha=6, total_step=total, tinit=2, tfinal=4, target_modules=["up", "down"])
    torch, twin, layers = _torch_twin(params, hf.AdaLoraConfig(**given))
    names = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    held = lambda layer, leaf: getattr(layer, names[leaf])["default"]
    for name, layer in layers.items():
        for leaf in names:
            held(layer, leaf).data = torch.tensor(np.array(peft.adapter[name]["kernel"][leaf]).T.copy()).reshape(held(layer, leaf).shape)
    y = twin(torch.tensor(np.array(x)))
    np.testing.assert_allclose(_outputs_and_gradients(model, peft, x)[0], y.detach().numpy(), atol=1e-5)
    theirs = torch.optim.SGD([held(layer, leaf) for layer in layers.values() for leaf in names], lr=rate)
    tx, run = jpeft.optimizer(optax.sgd(rate), peft), jpeft.wrap(model.apply, method)

    @jax.jit
    def step(adapter, state):
        grads = jax.grad(lambda adapter: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).mean())(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    adapter, state, pruned = peft.adapter, tx.init(peft.adapter), []
    for t in range(1, total + 1):
        adapter, state = step(adapter, state)
        torch.sin(twin(torch.tensor(np.array(x)))).mean().backward()
        theirs.step()
        twin.base_model.update_and_allocate(t)
        theirs.zero_grad()
        for name, layer in layers.items():
            leaves = adapter[name]["kernel"]
            for leaf in names:
                want = held(layer, leaf).detach().numpy().T.reshape(leaves[leaf].shape)
                np.testing.assert_allclose(leaves[leaf], want, atol=1e-5, err_msg=f"step {t}")
            np.testing.assert_array_equal(leaves["e"] == 0, held(layer, "e").detach().numpy()[:, 0] == 0, err_msg=f"step {t}")
        pruned.append(int(sum((part["kernel"]["e"] == 0).sum() for part in adapter.values())))
    assert pruned[:2] == [0, 0]
    assert pruned[-5:] == [4] * 5
    pattern = twin.peft_config["default"].rank_pattern
    folded = jpeft.fold(peft.replace(adapter=adapter))
    for name in layers:
        kept = sum(next(mask for path, mask in pattern.items() if f"{name}.lora_E" in path))
        assert folded.adapter.get(name, {}).get("kernel", {"e": np.zeros(0)})["e"].size == kept


# --- fewer ranks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["plain", "scan-mha"])
def test_folding_leaves_out_what_has_gone(model, tmp_path):
    """Some triplets of one kernel, all of another; in a stack, other numbers in each layer."""
    peft = jpeft.apply(base(model), method="adalora", rank=4, target_rank=2, total_steps=9)
    chex.assert_trees_all_equal(jpeft.fold(peft).adapter, peft.adapter)  # not trained yet
    peft = peft.replace(adapter=noised(peft.adapter))
    gone = {}
    for path, leaf in jpeft.flatten(peft.adapter).items():
        if path.endswith("query/kernel/e"):
            gone[path] = leaf.at[..., 1].set(0.0) if leaf.ndim == 1 else leaf.at[0, :2].set(0.0).at[1, 3].set(0.0)
        if path.endswith("up/kernel/e"):
            gone[path] = jnp.zeros_like(leaf)
    peft = peft.replace(adapter=jpeft.tree.replace(peft.adapter, gone))
    folded = jpeft.fold(peft)
    shapes = {path: leaf.shape for path, leaf in jpeft.flatten(folded.adapter).items()}
    assert not any("up/" in path for path in shapes)
    assert {shape[-1] for path, shape in shapes.items() if path.endswith("query/kernel/e")} == {3}
    assert {shape[-1] for path, shape in shapes.items() if path.endswith("value/kernel/e")} == {4}
    assert jpeft.fold(folded).method == folded.method == peft.method
    run = jpeft.wrap(MODELS[model].apply, peft.method)
    want = run(peft.variables, batch()["x"])
    chex.assert_trees_all_close(run(folded.variables, batch()["x"]), want, atol=1e-6)
    chex.assert_trees_all_close(MODELS[model].apply({"params": jpeft.merge(folded)}, batch()["x"]), want, atol=1e-5)
    jpeft.save(tmp_path / "out", folded)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "out", peft.params).adapter, folded.adapter)
    assert jax.jit(jpeft.fold)(peft).adapter.keys() == peft.adapter.keys()
    tx = jpeft.optimizer(optax.sgd(1.0), folded)  # and it can be trained on
    updates, _ = tx.update(folded.adapter, tx.init(folded.adapter), folded.adapter)
    chex.assert_trees_all_equal_shapes(updates, folded.adapter)


def test_more_ranks_than_the_method_has_are_refused(mlp):
    _, params, _ = mlp
    wide = jpeft.apply(params, method="adalora", rank=6, target_rank=2)
    with pytest.raises(ValueError, match="have rank 6, and the method's options allow 4"):
        jpeft.adalora(rank=4, target_rank=2).expected(params, wide.adapter)


# --- training -----------------------------------------------------------------------------------------------------------------------------


def test_the_trainer_gives_the_number_of_steps_and_resumes(tmp_path):
    """Bit for bit, from a checkpoint in the middle of the budget; the saved adapter has the ranks that were kept."""
    options = ("rank=4", "target_rank=2", "target=.*(query|value)/kernel", "dropout=0.1")
    fields = make_base(tmp_path, train=64, validation=8)
    fields |= {"batch_size": 8, "steps": 20, "checkpoint_every": 10, "eval_every": 20}
    config = TrainConfig(**fields, method="adalora", options=options, output=str(tmp_path / "run"))
    result = train(config)
    assert result.peft.method.total_steps == 20
    kept = [leaf.size for path, leaf in jpeft.flatten(result.peft.adapter).items() if path.endswith("/e")]
    assert sum(kept) == 2 * 4
    assert bits(load_run(result.path).peft.adapter) == bits(result.peft.adapter)
    again = RunFolder(tmp_path / "again")
    again.path.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(result.path / name, again.path / name)
    shutil.copytree(RunFolder(result.path).checkpoints / "10", again.checkpoints / "10")
    resumed = train(dataclasses.replace(config, output=str(again.path), resume=True))
    assert bits(resumed.peft.adapter) == bits(result.peft.adapter)
    assert records(resumed.path) == records(result.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank=5 is more than rank=4"),
        ({"t_init": 60, "t_final": 40, "total_steps": 100}, "t_init=60 and t_final=40 leave nothing of the 100 steps"),
        ({"t_init": 0.5, "total_steps": 100}, "t_init=0.5 and t_final=0.5 leave nothing"),
        ({"t_init": 1.5}, "t_init=1.5 must be"),
        ({"init_r": 4}, "Here 'init_r' is called 'rank'"),
        ({"orth_reg_weight": 0.1}, "Here 'orth_reg_weight' is called 'orthogonal'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adalora(**options)


def test_an_optimizer_needs_the_number_of_steps(mlp):
    _, params, _ = mlp
    with pytest.raises(ValueError, match=r"must know their number: jpeft.adalora\(total_steps=1000\)"):
        jpeft.optimizer(optax.adam(1e-3), jpeft.apply(params, method="adalora"))
    jpeft.optimizer(optax.adam(1e-3), jpeft.apply(params, method="adalora", rank=4, target_rank=4))  # no rank goes
    with pytest.raises(ValueError, match="leave nothing of the 3 steps"):
        jpeft.adalora(t_init=5).for_steps(3)


def test_a_chain_with_stages_refuses_a_budget():
    with pytest.raises(ValueError, match="'ada' counts the steps of its optimizer"):
        jpeft.chain(ada=jpeft.adalora(), far=jpeft.far())
