"""A flag is one field: its help, range and rules are read off the field, and its former names still work."""

import dataclasses
import json

import pytest

from jpeft.deprecation import renamed_fields, renamed_members
from jpeft.training import config as config_module
from jpeft.training.config import CompareConfig, Settings, TrainConfig, changed_fields, check_values, from_json, to_json
from jpeft.training.setting import check_ranges, configuration, names_where, optional_fields, renamed, setting, settings_of

REQUIRED = {"model": "m", "data": "d", "output": "o"}


@pytest.mark.parametrize("cls", [Settings, TrainConfig, CompareConfig])
def test_every_field_has_help(cls):
    about = settings_of(cls)
    assert about.keys() == {field.name for field in dataclasses.fields(cls)}
    for name, one in about.items():
        assert one.help.endswith("."), name
        assert one.help[0].isupper(), name


def test_what_may_change_between_a_run_and_its_continuation():
    assert names_where(TrainConfig, lambda about: about.resume_safe) == {
        *("output", "log_every", "checkpoint_every", "keep", "resume", "overwrite", "export", "progress", "mesh", "remat", "attention"),
        "adapter",  # its fingerprint is compared
    }


def test_optional_fields():
    optional = optional_fields(Settings)
    assert optional >= {"pair", "target", "steps", "learning_rate", "head_lr_scale", "clip", "mesh", "eval_every", "patience"}
    assert optional.isdisjoint({"model", "text", "epochs", "schedule", "warmup", "remat", "progress"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, got 0."),
        ({"patience": 0}, r"patience must be at least 1 \(or none\), got 0."),
        ({"clip": float("nan")}, r"clip must be positive \(or none\), got nan."),
        ({"warmup": -0.1}, "warmup must be between 0 and 1, got -0.1."),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0."),
        ({"learning_rate": float("inf")}, r"learning_rate must be positive and at most 3.40282e\+38 \(or none\), got inf."),
        ({"steps": 10**30}, r"steps must be at least 1 and at most 2,147,483,647 \(or none\), got 10+."),
        ({"steps": 1.5}, "steps must be a whole number, or None, got 1.5."),
        ({"steps": float("nan")}, "steps must be a whole number, or None, got nan."),
        ({"batch_size": True}, "batch_size must be a whole number, got True."),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'."),
        ({"learning_rate": True}, "learning_rate must be a number, or None, got True."),
        ({"learning_rate": 10**400}, "learning_rate must be a number, or None, got 10+"),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1."),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295, got 4294967296."),
        ({"seed": True}, "seed must be a whole number, got True."),
        ({"resume": 1}, "resume must be True or False, got 1."),
        ({"schedule": "sine"}, "schedule must be one of 'constant', 'linear', 'cosine', got 'sine'."),
        ({"text": 3}, "text must be a text, got 3."),
        ({"options": 3}, "options must be a list, each a text, got 3."),
    ],
)
def test_ranges(changes, message):
    with pytest.raises(ValueError, match=message):
        check_values(TrainConfig(**REQUIRED, **changes))


# --- former names -----------------------------------------------------------------------------------------------------


def test_former_names_of_fields_still_work():
    assert renamed(TrainConfig) == {"head_rate": "head_lr_scale", "accumulate": "grad_accum"}
    with pytest.warns(DeprecationWarning, match=r"TrainConfig\(accumulate=...\) is now called grad_accum="):
        config = TrainConfig(**REQUIRED, accumulate=4)
    assert config == TrainConfig(**REQUIRED, grad_accum=4)
    with pytest.warns(DeprecationWarning, match="TrainConfig.accumulate is now called TrainConfig.grad_accum"):
        assert config.accumulate == 4
    with pytest.warns(DeprecationWarning, match="head_rate"):
        assert dataclasses.replace(config, head_rate=2.0).head_lr_scale == 2.0
    with pytest.warns(DeprecationWarning, match="head_rate"):
        assert CompareConfig(**REQUIRED, head_rate=2.0).head_lr_scale == 2.0


def test_a_configuration_of_before_is_read():
    config = TrainConfig(**REQUIRED, grad_accum=2, head_lr_scale=3.0)
    values = to_json(config)
    values |= {"accumulate": values.pop("grad_accum"), "head_rate": values.pop("head_lr_scale")}
    assert from_json(json.loads(json.dumps(values))) == config


def test_a_record_holds_the_rates_that_were_used():
    config = TrainConfig(**REQUIRED, head_lr_scale=3.0)
    record = json.loads(json.dumps(to_json(config, learning_rate=2e-3, head_lr_scale=3.0)))
    assert (record["learning_rate"], record["head_lr_scale"], record["by_default"]) == (2e-3, 3.0, ["learning_rate"])
    assert from_json(record) == config
    with pytest.raises(ValueError, match=r"unknown fields \['by_default'\]"):
        from_json(record | {"by_default": ["nothing"]})


def test_former_names_of_methods_and_functions_still_work():
    @renamed_fields(about="read_config")
    class Folder:
        def read_config(self):
            return "read"

    with pytest.warns(DeprecationWarning, match="Folder.about is now called Folder.read_config"):
        assert Folder().about() == "read"
    find = renamed_members("jpeft.training.config", read_json="from_json")
    with pytest.warns(DeprecationWarning, match="read_json is now called jpeft.training.config.from_json"):
        assert find("read_json") is from_json
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        find("nothing")


# --- the walk ---------------------------------------------------------------------------------------------------------


@configuration
class WithOneMore(TrainConfig):
    """One field more than `TrainConfig`, as docs/guides/adding_a_flag.md adds it."""

    ema: float | None = setting("Decay of an average of the adapters of all steps; none for no average.", default=None, above=0, at_most=1)
    note: str = setting("A remark for config.json.", default="", resume_safe=True)


def test_a_flag_is_one_field(monkeypatch, capfd):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(WithOneMore, args=["--help"])
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "--ema {None}|FLOAT Decay of an average of the adapters of all steps; none for no average." in shown
    config = tyro.cli(WithOneMore, args=["--model", "m", "--data", "d", "--output", "o", "--ema", "0.9", "rank=8"])
    assert (config.ema, config.options) == (0.9, ("rank=8",))

    assert "ema" in optional_fields(WithOneMore)
    with pytest.raises(ValueError, match=r"ema must be above 0 and at most 1 \(or none\), got 2.0"):
        check_ranges(dataclasses.replace(config, ema=2.0))

    # A run may not be continued with another average, but with another note.
    monkeypatch.setattr(config_module, "TrainConfig", WithOneMore)
    changed = dataclasses.replace(config, ema=0.5, note="again")
    assert changed_fields(to_json(config), to_json(changed)) == {"ema": (0.9, 0.5)}
    before = {name: value for name, value in to_json(config).items() if name != "ema"}
    assert from_json(before) == dataclasses.replace(config, ema=None)
