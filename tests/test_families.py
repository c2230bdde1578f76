"""Every family: the promises to methods, the roles of its modules, and what its description must say."""

import dataclasses

import flax.linen as nn
import pytest
from test_bert import FAMILIES, TWINS, tiny
from test_decoders import CASES
from test_decoders import FAMILIES as DECODERS

import jpeft
from jpeft.models import abstract_params, families
from jpeft.models.common.attention import AttentionCore
from jpeft.models.common.contract import check_model
from jpeft.models.common.family import BlockStack, Roles

CONFIGS = {name: tiny(name) for name in (*FAMILIES, *TWINS)} | {name: CASES[name][0] for name in DECODERS}


def models_of(config):
    """All models of a configuration's family."""
    for described in families.family_of(config.model_type).models.values():
        yield described.module(config, 3) if described.has_labels else described.module(config)


def test_every_model_type_is_here():
    assert set(CONFIGS) == {name for family in families.FAMILIES for name in family.hf_classes}
    for family in families.FAMILIES:
        assert set(family.hf_classes) == set(family.config.HF_FIELDS)
        assert family.language_model in family.models


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_promises_to_methods(name, scan):
    config = dataclasses.replace(CONFIGS[name], scan=scan)
    for model in models_of(config):
        check_model(model, families.family_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_cover_every_parameter_once(name):
    roles = families.family_of(name).roles
    for model in models_of(dataclasses.replace(CONFIGS[name], tie_word_embeddings=False) if name in DECODERS else CONFIGS[name]):
        for path in jpeft.flatten(abstract_params(model)):
            played = [field.name for field in dataclasses.fields(Roles) if roles.matches(field.name, path)]
            inside_head = {"head", "label_head", "word_head"} & set(played)
            assert len(set(played) - inside_head) == (0 if "head" in played else 1), (path, played)
            assert not inside_head or "head" in played, (path, played)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_layouts_says_the_same(name):
    """Methods find layers by `jpeft.layouts`, from names alone; what a family says of itself must agree."""
    layouts = pytest.importorskip("jpeft.layouts")
    roles = families.family_of(name).roles
    for model in models_of(CONFIGS[name]):
        params = abstract_params(model)
        for role in ("embedding", "attention_in", "attention_out", "ffn_in", "ffn_out"):
            weights = [path for path in jpeft.flatten(params) if roles.matches(role, path) and not path.endswith("bias")]
            assert sorted(layouts.find(params, f"@{role}")) == sorted(weights)


def broken_promises(name, **changes):
    """What `check_model` says of a family's first model, with changes to the description."""
    family = dataclasses.replace(families.family_of(name), **changes)
    with pytest.raises(ValueError, match="breaks promises of jpeft.models.common.contract") as error:
        check_model(next(iter(family.models.values())).module(CONFIGS[name]), family)
    return str(error.value)


def test_broken_promises_of_modules_are_listed(monkeypatch):
    class ShortCore(AttentionCore):
        """Takes as many keys as queries, and no more."""

        def __call__(self, query, key, value, mask, *, deterministic=True):
            return query * value

    monkeypatch.setattr("jpeft.models.bert.encoder.make_core", lambda config, dropout: ShortCore(dropout, name="core"))
    monkeypatch.setattr("jpeft.models.gpt2.model.make_core", lambda config, dropout: AttentionCore(dropout, name="attention"))
    assert "'core' does not accept one more key: " in broken_promises("bert")
    assert "No module named 'core' ran." in broken_promises("gpt2")


def test_broken_promises_of_descriptions_are_listed():
    gpt2 = families.family_of("gpt2")
    roles = dataclasses.replace(gpt2.roles, embedding="words", norms="ln_1")
    message = broken_promises("gpt2", roles=roles, stacks=(BlockStack(path="h", num_layers="hidden_size"), BlockStack(path="decoder/h")))
    assert "embedding='words' must match one table, and matches none" in message
    assert "'h/*/ln_2/bias' is in a block and plays none of the roles" in message
    assert "The stack 'h' has the blocks ['0', '1']; hidden_size is 16." in message
    assert "No parameter is in the stack 'decoder/h'." in message


def test_unknown_model_type():
    with pytest.raises(ValueError, match="Unknown model_type 't5'; supported: bert, roberta"):
        families.family_of("t5")


def test_a_model_of_no_task_is_refused():
    with pytest.raises(ValueError, match="A Dense is none of the models of its family: GPT2Model, GPT2LMHeadModel"):
        families.family_of("gpt2").task_model(nn.Dense(3))
