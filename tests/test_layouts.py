"""The table of layouts: every role in every public family, by the names and shapes of parameters alone."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from layout_families import FAMILIES
from layout_table import PAGE, coverage, found, page
from layout_trees import container
from tables import MODELS, batch

import jpeft
from jpeft import layouts
from jpeft.layouts import Role
from jpeft.layouts.roles import parse
from jpeft.models import BertConfig, GPT2Config, LlamaConfig, abstract_params, families
from jpeft.tree.head import head_leaves
from jpeft.tree.kernels import axes_of
from jpeft.tree.select import matches, select

CASES = [(name, form) for name in FAMILIES for form in ("numbered", "stacked")] + [
    ("MaxText", "stacked-1"),
    ("t5x (scalable)", "stacked-1"),
]

# Families that the table must cover.
PROMISED = {
    "BERT", "RoBERTa", "DistilBERT", "ELECTRA", "GPT-2", "GPT-NeoX", "OPT", "BART", "T5", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 1",
    "Gemma 2", "Gemma 3", "Phi", "Falcon", "Mixtral", "Whisper", "ViT (HF)", "ViT (vision_transformer)", "ViT (big_vision)",
    "Gemma 1 (google)", "Gemma 2 (google)", "Gemma 3 (google)", "MaxText", "t5x", "nn.MultiHeadDotProductAttention", "ViT (bonsai)",
    "Qwen3 (bonsai)", "Gemma3 (bonsai)",
}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_role_of_a_family(name, form):
    family, axis = FAMILIES[name], {"numbered": None, "stacked": 0, "stacked-1": 1}[form]
    shapes = family.shapes(form)
    detected = layouts.detect(shapes)
    assert detected is not None
    assert detected.name == family.layout
    stacks = [(stack.path, stack.count, stack.axis) for stack, _ in layouts.blocks(shapes)]
    assert sorted(stacks) == sorted((container(part, form), 2, axis) for part in family.parts)
    wrong = {role: found(family, role, form) ^ family.expected(role, form) for role in Role if role is not Role.ATTENTION_IN}
    assert not {role: paths for role, paths in wrong.items() if paths}
    inputs = (family.expected(role, form) for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.KV))
    assert found(family, Role.ATTENTION_IN, form) == set().union(*inputs)


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[1] == "numbered"])
def test_blocks_have_numbers(name, form):
    for stack, _ in layouts.blocks(FAMILIES[name].shapes(form)):
        assert set(stack.leaves.values()) == {0, 1}
        assert all(re.match(rf"{stack.path}[/_]{i}/", path) for path, i in stack.leaves.items())


def test_the_page_names_roles_that_exist():
    targets = re.findall(r'"(@[^"]+)"', PAGE.read_text())
    assert targets
    for target in targets:
        assert parse(target)


def test_the_coverage_table_is_committed():
    print(coverage())
    assert set(FAMILIES) >= PROMISED
    assert PAGE.read_text() == page(), "run python tests/layout_table.py"


# --- models that methods have met before -------------------------------------------------------------------------------------------------

# The regexes that methods had before there was a table. What they chose in our models is what their roles must choose: adapters of before
# are still read.
_SELF = (
    r"attention/output/dense|out_lin|attn/c_proj|o_proj|(?<!encoder_attn/)out_proj|SelfAttention/o|attn/out|attention/out|"
    r"MultiHeadDotProductAttention_\d+/out|"
    r"attn/mha/out"  # which no name tells: it is read off the shapes
)
_CROSS = r"encoder_attn/out_proj|EncDecAttention/o"
_FFN = r"(?<!attention/)output/dense|lin2|mlp/c_proj|down_proj|fc2|wo|down"
BEFORE = {
    "@attention_out|@cross_attention_out|@ffn_out": rf"(.*/)?({_SELF}|{_CROSS}|{_FFN})/kernel",
    "@attention_out|@ffn_out": rf"(.*/)?({_SELF}|{_FFN})/kernel",
    "@ffn_out": rf"(.*/)?({_FFN})/kernel",
    "@post_norm/scale": r"(.*/)?((?<!attention/)output/LayerNorm|output_layer_norm)/scale",
    "@norms": r"(.*/)?([^/]*([Ll]ayer_?[Nn]orm|rmsnorm|RMSNorm)[^/]*|ln_\w+|ln\d*|norm\w*)/(scale|bias|weight)",
    "@ffn_in|@ffn_out": (
        r"(.*/)?(intermediate/dense|(?<!attention/)output/dense|(ffn/)?lin[12]|fc[12]|c_fc|mlp/c_proj|(up|gate|down)_proj|wi(_[01])?|wo|"
        r"(mlp/)?(up|gate|down)|mlp/Dense_[01])/kernel"
    ),
    "@key|@qkv": r"(.*/)?(key|k_lin|k_proj|(Self|EncDec)Attention/k|c_attn|query_key_value|qkv)/kernel",
    "@key|@value|@qkv": (
        r"(.*/)?(key|value|k_proj|v_proj|k_lin|v_lin|(SelfAttention|EncDecAttention)/[kv]|c_attn|query_key_value|qkv)/kernel"
    ),
    "@qkv": r"(.*/)?(c_attn|query_key_value|qkv)/kernel",
    "@embedding": r"(.*/)?(word_embeddings|wte|embed_tokens|token_embeddings?|embedder|embed|embeddings?|shared)/embedding",
    "@query/bias": r"(.*/)?(query|q_lin|q_proj|q)/bias",
    "@head": r"(pre_classifier|classifier|score|qa_outputs|classification_head)(/.*)?",
    "@head|@lm_head": r"(classifier|pre_classifier|cls|lm_head|vocab_\w+|generator_\w+)/.*",
    "@pooler": r"(\w+/)?pooler/.*",
}
BEFORE_OF_OURS = {  # our small test models were unknown to these
    "@ffn_in/bias": r"(.*/)?(intermediate/dense|lin1|fc1|c_fc|up_proj|wi|mlp/up|mlp/Dense_0)/bias",
    "@pooler|@final_norm": (
        r"(?!.*embed)(.*/)?(pooler|ln_f|final_?layer_?norm|final_norm|norm|layer_?norm|encoder_norm|decoder_norm|ln_post)(/.*)?"
    ),
}
MODULES_BEFORE = {
    "@block": r"(?P<module>.+?)/(mlp/(c_proj|down_proj|down|fc2|wo)|DenseReluDense/wo|(?<!attention/)output/dense|down)/kernel",
    "@ffn|@ffn_residual": (
        r"(?P<module>(.*/)?(mlp|ffn|feed_forward|DenseReluDense))/(c_proj|lin2|down_proj|down|fc2|wo)/kernel|"
        r"(?P<residual>(.*/)?(?<!attention/)output)/LayerNorm/scale"
    ),
}


def trees():
    """Our models by name: those of the tables, and every class of every family."""
    for name in MODELS:
        if "remat" not in name:
            # The batch is an argument: it is cached, and what is first made inside of `eval_shape` is no array.
            yield name, lambda name=name: jax.eval_shape(MODELS[name].init, jax.random.key(0), batch()["x"])["params"]
    sizes = dict(vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    for config in (BertConfig, GPT2Config, LlamaConfig):
        family = next(family for family in families.FAMILIES if family.config is config)
        for kind in family.hf_classes:
            for task, described in family.models.items():
                more = {} if config is GPT2Config else {"model_type": kind}
                labels = {"num_labels": 3} if described.has_labels else {}
                make = lambda config=config, model=described.module, more=more, labels=labels: model(config(**sizes, **more), **labels)
                yield f"{kind}-{task}", lambda make=make: abstract_params(make())


TREES = dict(trees())


@pytest.mark.parametrize("name", TREES)
def test_roles_choose_what_regexes_chose(name):
    leaves = jpeft.flatten(TREES[name]())
    for target, regex in BEFORE.items() | (BEFORE_OF_OURS.items() if name not in MODELS else set()):
        chosen = [path for path in leaves if re.fullmatch(regex, path)]
        if target == "@pooler|@final_norm":
            inside = {path for stack, _ in layouts.blocks(leaves) for path in stack.leaves}
            chosen = [path for path in chosen if path not in inside]
        if target not in ("@head", "@head|@lm_head", "@pooler", "@norms", "@pooler|@final_norm", "@embedding"):
            skip = head_leaves(leaves, "auto")  # methods leave the head to itself
            chosen = [path for path in chosen if path not in skip]
        assert layouts.find(leaves, target, required=False) == chosen, target


@pytest.mark.parametrize("name", [name for name in TREES if "distilbert" not in name])
def test_modules_are_those_that_regexes_found(name):
    leaves = jpeft.flatten(TREES[name]())
    for target, regex in MODULES_BEFORE.items():
        matches = {path: match for path in leaves if (match := re.fullmatch(regex, path))}
        want = [((match.groupdict().get("residual") or match["module"]), path) for path, match in matches.items()]
        assert [(module.path, module.leaf) for module in layouts.modules(leaves, target, required=False)] == want, target


def test_only_encoders_enclose_texts():
    for name in TREES:
        layout = layouts.detect(TREES[name]())
        assert (layout is not None and layout.enclosed) == ("bert" in name or "electra" in name), name


# --- trees of every form -----------------------------------------------------------------------------------------------------------------


def test_paths_alone_and_every_container_will_do():
    shapes = FAMILIES["Llama"].shapes()
    want = layouts.find(shapes, "@ffn_out")
    assert layouts.find(list(shapes), "@ffn_out") == want
    arrays = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    assert layouts.find(arrays, "@ffn_out") == want
    nested = jax.eval_shape(lambda: jpeft.tree.unflatten(arrays))
    assert layouts.find(nested, "@ffn_out") == want
    nested["model"]["layers"] = [nested["model"]["layers"][str(i)] for i in range(2)]
    assert layouts.find(nested, "@ffn_out") == want
    nested["model"]["layers"] = dict(enumerate(nested["model"]["layers"]))  # as NNX numbers them
    assert layouts.find(nested, "@ffn_out") == want


def test_two_towers_follow_a_layout_each():
    vision = {f"vision_tower/{path}": shape for path, shape in FAMILIES["ViT (HF)"].shapes().items()}
    text = {f"language_model/{path}": shape for path, shape in FAMILIES["Llama"].shapes("stacked").items()}
    both = vision | text
    assert [(stack.path, layout.name) for stack, layout in layouts.blocks(both)] == [
        ("language_model/model/layers", "llama"),
        ("vision_tower/vit/encoder/layer", "hf_vit"),
    ]
    assert layouts.find(both, "@ffn_out") == layouts.find(vision, "@ffn_out") + layouts.find(text, "@ffn_out")


@pytest.mark.parametrize(
    ("shapes", "target", "paths"),
    [
        ({"mlp/up/kernel": (8, 16), "mlp/down/kernel": (16, 8)}, "@ffn_in|@ffn_out", ["mlp/up/kernel", "mlp/down/kernel"]),
        ({"attn/key/kernel": (8, 8), "classifier/kernel": (8, 2)}, "@key", ["attn/key/kernel"]),
        ({"query/kernel": (8, 8), "query/bias": (8,), "LayerNorm/scale": (8,)}, "@query/bias", ["query/bias"]),
        ({"attention/output/dense/kernel": (8, 8), "output/dense/kernel": (16, 8)}, "@ffn_out", ["output/dense/kernel"]),
        ({"crossattention/output/dense/kernel": (8, 8), "output/dense/kernel": (16, 8)}, "@ffn_out", ["output/dense/kernel"]),
        ({"attention/wo/kernel": (8, 8), "mlp/wo/kernel": (16, 8)}, "@ffn_out", ["mlp/wo/kernel"]),
        ({"encoder_attn/out_proj/kernel": (8, 8)}, "@cross_attention_out", ["encoder_attn/out_proj/kernel"]),
        ({"embed/embedding": (9, 8), "ln_f/scale": (8,)}, "@embedding|@final_norm", ["embed/embedding", "ln_f/scale"]),
    ],
)
def test_parts_of_models(shapes, target, paths):
    assert layouts.find(shapes, target) == paths


# --- messages ----------------------------------------------------------------------------------------------------------------------------

STRANGE = {f"cell_{i}/{name}/kernel": (8, size) for i in range(3) for name, size in (("widen", 16), ("mix", 8))}


@pytest.mark.parametrize(
    ("shapes", "target", "message"),
    [
        (STRANGE, "@ffn_out", r"target='@ffn_out': no .* role \(the projection out of the feed-forward layer\)"),
        (STRANGE, "@ffn_out", r"It follows no known layout; looked for: .*down_proj"),
        (STRANGE, "@ffn_out", r"kernels of repeated modules: 'cell_\*/widen/kernel' \(8, 16\), 'cell_\*/mix/kernel' \(8, 8\)"),
        (STRANGE, "@ffn_out", r"such as target=r'cell_\\d\+/widen/kernel', or by a list of names, such as target=\['widen'\]"),
        (FAMILIES["GPT-2"].shapes(), "@cross_attention_out", r"follow the layout 'gpt2'; looked for: crossattention/c_proj"),
        (FAMILIES["GPT-2"].shapes(), "@post_norm", r"looked for: no names, as this layout has no such module"),
        (STRANGE, "@fnn_out", r"'@fnn_out' .* is not a role\. Did you mean '@ffn_out'\? The roles are @query, "),
        (STRANGE, "@block", r"stands for modules and has no leaves"),
        ({"x/linear1/kernel": (8, 8), "attention/wo/kernel": (8, 8)}, "@ffn_out", "no parameter of the model has this role"),
    ],
)
def test_what_is_not_found(shapes, target, message):
    with pytest.raises(ValueError, match=message):
        layouts.find(shapes, target)
    assert "@block" in target or "fnn" in target or layouts.find(shapes, target, required=False) == []


def test_a_name_with_several_roles_is_refused(monkeypatch):
    other = layouts.Layout(name="other", families="", attention_out="down")
    monkeypatch.setattr("jpeft.layouts.search.LAYOUTS", (*layouts.LAYOUTS, other))
    shapes = {"cell/down/kernel": (16, 9)}
    with pytest.raises(ValueError, match=r"'cell/down/kernel' could be .*'@ffn_out'\) or .*'@attention_out'.*target=\['cell/down'\]"):
        layouts.find(shapes, "@ffn_out")
    assert layouts.find(shapes, "@ffn_out|@attention_out") == ["cell/down/kernel"]


# --- what stands on it -------------------------------------------------------------------------------------------------------------------


def test_select_takes_roles():
    shapes = FAMILIES["OPT"].shapes()
    assert select(shapes, "@ffn_out") == [f"model/decoder/layers/{i}/fc2/kernel" for i in range(2)]
    assert select(shapes, ["@ffn_out", "embed_tokens"]) == ["model/decoder/embed_tokens/embedding", *select(shapes, "@ffn_out")]
    biases = [path for path in shapes if path.endswith("bias")]
    assert select(biases, "@query/bias", params=shapes) == [f"model/decoder/layers/{i}/self_attn/q_proj/bias" for i in range(2)]
    with pytest.raises(ValueError, match="subset='@kv/bias': no parameter"):
        select(biases, "@kv/bias", option="subset")


def test_a_rule_for_single_paths_is_no_role():
    with pytest.raises(ValueError, match="'@ffn_out' is a role, which only a whole model shows"):
        matches("@ffn_out", "mlp/down/kernel")
    with pytest.raises(ValueError, match="is a role"):
        jpeft.apply({"down": {"kernel": jnp.ones((4, 4))}}, method="lora", rank={"@ffn_out": 2})


def test_a_role_is_a_target_of_methods():
    params = jax.tree.map(jnp.zeros, jpeft.tree.unflatten(FAMILIES["Falcon"].shapes()), is_leaf=lambda leaf: isinstance(leaf, tuple))
    for method in ("lora", "dora"):
        adapted = jpeft.flatten(jpeft.apply(params, method=method, target="@ffn_out").adapter)
        assert {path.rpartition("dense_4h_to_h")[0] for path in adapted} == {f"transformer/h/{i}/mlp/" for i in range(2)}


def test_the_head_of_a_vit_is_a_task_head():
    params = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in FAMILIES["ViT (big_vision)"].shapes().items()}
    assert set(head_leaves(params, "auto")) == {"head/kernel", "head/bias"}
    assert head_leaves({"body/kernel": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}, "auto") == {}


@pytest.mark.parametrize(
    ("name", "leaf", "inputs", "outputs"),
    [
        ("nn.MultiHeadDotProductAttention", "query/kernel", (0,), (1, 2)),
        ("nn.MultiHeadDotProductAttention", "out/kernel", (0, 1), (2,)),
        ("Qwen3 (bonsai)", "k_proj/w", (0,), (1, 2)),
        ("Qwen3 (bonsai)", "o_proj/w", (0, 1), (2,)),
        ("Gemma 1 (google)", "qkv_einsum/w", (2,), (0, 1, 3)),
        ("Gemma 3 (google)", "q_einsum/w", (1,), (0, 2)),
        ("Gemma 3 (google)", "kv_einsum/w", (2,), (0, 1, 3)),
        ("Gemma 3 (google)", "attn_vec_einsum/w", (0, 1), (2,)),
    ],
)
def test_geometry_of_kernels_with_heads(name, leaf, inputs, outputs):
    for form in ("numbered", "stacked"):
        shapes = FAMILIES[name].shapes(form)
        path, more = next(path for path in shapes if path.endswith(leaf)), int(form == "stacked")
        assert axes_of(path, shapes[path]) == ((0,) * more, tuple(i + more for i in inputs), tuple(i + more for i in outputs))


def test_layouts_know_neither_methods_nor_models():
    imported = set()
    for file in Path(layouts.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
            imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    assert {name for name in imported if name.startswith("jpeft") and not name.startswith("jpeft.layouts")} == {"jpeft.tree.paths"}
