"""The description of the toy encoder-decoder."""

import jax
import jax.numpy as jnp

from jpeft.models.common.family import BlockStack, CheckpointNames, Family, Roles, TaskModel
from jpeft.models.common.partition import megatron_rules
from toy_family.config import ToyConfig
from toy_family.model import ToyForConditionalGeneration, ToyModel

ROLES = Roles(
    embedding="shared",
    attention_in="q|k|v",
    attention_out="o",
    ffn_in="wi",
    ffn_out="wo",
    norms="attention/norm|cross/norm|mlp/norm",
)


def two_texts(config):
    """Example inputs."""
    return {name: jax.ShapeDtypeStruct((1, 2), jnp.int32) for name in ("input_ids", "decoder_input_ids")}


FAMILY = Family(
    config=ToyConfig,
    hf_classes={"toy": "Toy"},
    models={
        "encoder-decoder": TaskModel(module=ToyModel, hf_suffix="Model"),
        "sequence-to-sequence-lm": TaskModel(
            module=ToyForConditionalGeneration, hf_suffix="ForConditionalGeneration", scores_words=True, requires_tied_head=True
        ),
    },
    language_model="sequence-to-sequence-lm",
    stacks=(BlockStack(path="encoder/block"), BlockStack(path="decoder/block", num_layers="num_decoder_layers")),
    roles=ROLES,
    partition=megatron_rules(ROLES),
    names=CheckpointNames(body="transformer", prefixed=False, tied=r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight"),
    example_inputs=two_texts,
)
