"""What the command line makes of its arguments: repeated and unknown flags, values with dashes, and errors in the words of the user."""

import dataclasses
from importlib import import_module

import pytest

import jpeft
from jpeft.cli import main
from jpeft.cli.cloze import COMMAND as CLOZE
from jpeft.cli.command import Command
from jpeft.cli.messages import as_typed
from jpeft.cli.predict import COMMAND as PREDICT
from jpeft.cli.tables import print_table
from jpeft.cli.train import COMMAND as TRAIN
from jpeft.training.config import TrainConfig

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


@pytest.fixture
def parse(monkeypatch, error_line):
    """Parses a command line and returns the arguments, or the error line, without running the command."""
    main_module = import_module("jpeft.cli.main")
    parsed = []
    stubs = tuple(dataclasses.replace(command, run=parsed.append) for command in main_module.COMMANDS)
    monkeypatch.setattr(main_module, "COMMANDS", stubs)

    def run(*arguments):
        status = main(list(arguments))
        return error_line(status) if status else parsed.pop()

    return run


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_repeated_list_keeps_all(parse):
    args = parse("predict", "run", "--text", "a", "b", "--batch-size", "3", "--text=c", "--pair", "x", "--pair", "y")
    assert (args.run, args.text, args.pair, args.batch_size) == ("run", ("a", "b", "c"), ("x", "y"), 3)
    assert parse("compare", *NEEDED, "--seeds", "1", "--methods", "lora", "--seeds", "2", "3", "--methods", "bitfit").seeds == (1, 2, 3)
    assert parse("train", *NEEDED, "rank=3", "--steps", "3", "alpha=2").options == ("rank=3", "alpha=2")


def test_the_last_of_two_values_counts_and_it_is_said(parse, monkeypatch):
    said = []
    monkeypatch.setattr(import_module("jpeft.cli.main"), "print", lambda text, file: said.append(text), raising=False)
    args = parse("train", *NEEDED, "--steps", "3", "--learning-rate", "1", "--steps=4", "--learning_rate", "2")
    assert (args.steps, args.learning_rate) == (4, 2.0)
    assert said == [
        "note: --steps was given twice, as 3 and as 4: the last counted.",
        "note: --learning-rate was given twice, as 1 and as 2: the last counted.",
    ]
    said.clear()
    assert parse("train", *NEEDED, "--steps", "3", "--steps", "3", "--resume", "--resume").steps == 3
    assert said == []


def test_values_may_begin_with_a_dash(parse):
    assert parse("predict", "run", "--text", "-5 degrees", "--text=--text", "-x").text == ("-5 degrees", "--text", "-x")
    assert parse("cloze", "--model", "m", "--template", "- {mask}", "--words", "a=b", "c=d").template == "- {mask}"


def test_a_switch_takes_no_value(parse):
    assert "--overwrite takes no value" in parse("train", *NEEDED, "--overwrite=False")


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("train", "--lr", "Did you mean --learning-rate?"),
        ("train", "-lr", "Did you mean --learning-rate?"),
        ("train", "--lerning-rate", "Did you mean --learning-rate?"),
        ("train", "--per_device_train_batch_size", "Did you mean --batch-size?"),
        ("train", "--num_train_epochs=3", "Did you mean --epochs?"),
        ("train", "--model_name_or_path", "Did you mean --model?"),
        ("train", "--output_dir", "Did you mean --output?"),
        ("train", "--gradient-accumulation-steps", "Did you mean --grad-accum?"),
        ("train", "--rank", "--method lora rank=VALUE"),
        ("train", "--lora_r", "--method lora rank=VALUE"),
        ("train", "--lora-alpha", "--method lora alpha=VALUE"),
        ("train", "--target_modules", "--method lora target=VALUE"),
        ("compare", "--r", "--methods 'lora rank=VALUE'"),
        ("compare", "--seed", "Did you mean --seeds?"),
        ("cloze", "--label", "Did you mean --label-column?"),
        ("merge", "--output", "Give it without a flag, as OUT."),
        ("predict", "--run", "Give it without a flag, as RUN."),
        ("eval", "--nonsense", "jpeft eval --help lists its flags."),
    ],
)
def test_an_unknown_flag_names_the_one_that_is_meant(parse, command, flag, meant):
    error = parse(command, flag, "1")
    assert f"jpeft {command} has no flag {flag.partition('=')[0]}." in error
    assert meant in error


def test_every_flag_that_is_meant_exists():
    from jpeft.cli import other_flags
    from jpeft.cli.arguments import flags_of
    from jpeft.cli.main import COMMANDS

    known = {flag for command in COMMANDS for flag in flags_of(command.args)} | {"RUN", "OUT"}
    assert {ours for names in other_flags.SAME.values() for ours in names} <= known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {train, compare,"),
        (["tran"], "There is no command 'tran'. Did you mean 'train'?"),
        (["train"], "jpeft train needs --model, --data, --output."),
        (["merge", "run"], "jpeft merge needs OUT."),
        (["train", *NEEDED, "--steps", "abc"], "--steps must be a whole number or none, got 'abc'."),
        (["train", *NEEDED, "--warmup", "-x"], "--warmup must be a number, got '-x'."),
        (["train", *NEEDED, "--warmup", "x"], "--warmup must be a number, got 'x'."),
        (["train", *NEEDED, "--schedule", "sine"], "'sine'"),
        (["train", *NEEDED, "--method"], "Missing value for argument '--method'."),
        (["methods", "a", "b"], "Unrecognized options: b"),
        (["predict", "run", "--batch-size", "0"], "--batch-size must be at least 1, got 0."),
        (["predict", "run", "--seed", "-1"], "--seed must be at least 0, got -1."),
        (["predict", "run", "--temperature", "nan"], "--temperature must be a finite number, got nan."),
        (["summary", "--labels", "0"], "--labels must be at least 1, got 0."),
        (["eval", "run", "--batch-size", "-3"], "--batch-size must be at least 1, got -3."),
    ],
)
def test_bad_arguments_are_one_line(parse, arguments, message):
    assert message in parse(*arguments)


# --- settings and options: refused before data and model are read -----------------------------------------------------


@pytest.fixture
def refuses(capfd, monkeypatch):
    """The error line of `jpeft train` with some flags."""
    monkeypatch.delenv("JPEFT_DEBUG", raising=False)

    def run(*flags, command="train"):
        assert main([command, *NEEDED, *flags]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "error: --steps must be at least 1 (or none), got 0."),
        (["--steps", "9" * 30], "error: --steps must be at least 1 and at most 2,147,483,647"),
        (["--learning-rate", "inf"], "error: --learning-rate must be positive"),
        (["--head_lr_scale", "nan"], "error: --head-lr-scale must be positive"),
        (["--seed", "-1"], "error: --seed must be between 0 and 4294967295"),
        (["--seed", str(2**32)], "error: --seed must be between 0 and 4294967295"),
        (["--batch-size", "8", "--grad-accum", "3"], "error: --grad-accum=3 does not divide --batch-size=8."),
        (["--mesh", "data=²"], "'data=²' is not AXIS=SIZE"),
        (["--mesh", ""], "names no axis"),
        (["--resume", "--overwrite"], "error: --resume continues"),
        (["--method", "lroa"], "There is no method 'lroa'. Did you mean 'lora'?"),
        *(
            ([f"{option}={value}"], option)
            for option in ("rank", "alpha")
            for value in ("abc", "nan", "inf", "[]", "True", "", "-1", "1e999")
        ),
        *(([f"rank={value}"], "rank=") for value in ("1.5", "[1]", "0", "9" * 30, "9" * 5000, "{'(':3}", "{}", "(" * 300, "{[]:1}")),
        *(([f"dropout={value}"], "dropout=") for value in ("1.0", "-0.1", "x")),
        *(([f"target={value}"], "target=") for value in ("[]", "", "(", "@nope", "['']", "3")),
        (["rslora=7"], "rslora=7 must be True or False"),
        (["--method", "freeze", "top=x"], "top='x' must be"),
        (["--method", "prompt_tuning", "length=x"], "length='x' must be"),
        (["r=3"], "Here 'r' is called 'rank'"),
        (["lora_alpha=3"], "Here 'lora_alpha' is called 'alpha'"),
    ],
)
def test_settings_and_options_are_refused(refuses, flags, message):
    assert message in refuses(*flags)


def test_rows_and_seeds_are_refused(refuses):
    assert "--seeds=[1, 1] must be one or more different numbers." in refuses("--seeds", "1", "1", command="compare")
    assert "learning_rate='nan' is not a positive number" in refuses("--methods", "lora learning_rate=nan", command="compare")
    assert "error: --methods must name one row or more" in refuses("--methods", command="compare")
    assert "--seeds must be between" in refuses("--seeds", "-1", command="compare")


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message", "said"),
    [
        (TRAIN, "max_length=64 is more than the model's 8 positions.", "--max-length=64 is more than the model's 8 positions."),
        (TRAIN, "d.csv: no column 'label'. Name the right one with `label`.", "d.csv: no column 'label'. Name the right one with --label."),
        (
            CLOZE,
            "d.csv: no column 'label'. Name the right one with `label`.",
            "d.csv: no column 'label'. Name the right one with --label-column.",
        ),
        (CLOZE, "give label=None to read it.", "give --label-column none to read it."),
        (TRAIN, "target='x' matches none of the parameters.", "target='x' matches none of the parameters."),
        (TRAIN, "Row 1: use --add-tokens (add_tokens=[...] in Python).", "Row 1: use --add-tokens (add_tokens=[...] in Python)."),
        (TRAIN, "/a/batch_size/x.csv: no such file.", "/a/batch_size/x.csv: no such file."),
        (TRAIN, "Cannot resume r with another configuration: seed (0 before, 1 now).", None),
        (PREDICT, "d.csv: no column 't'; it has 'a'. Name the right one with `text`.", None),
    ],
)
def test_messages_name_flags(command: Command, message, said):
    typed = as_typed(message, command.args, command.names)
    if said is not None:
        assert typed == said
    elif command is TRAIN:
        assert "--seed (0 before, 1 now)" in typed
    else:
        assert typed == "d.csv: no column 't'; it has 'a'. The run reads the columns that it was trained on: give a file that has them."


def test_square_brackets_are_text_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    print_table(("[red]split", "f1 [/]"), [("[bold]runs/x", "[/red] :smile:")])
    out = capfd.readouterr().out
    for text in ("[red]split", "f1 [/]", "[bold]runs/x", "[/red] :smile:"):
        assert text in out


def test_settings_are_named_as_in_python():
    with pytest.raises(ValueError, match="head_lr_scale must be positive"):
        jpeft.training.config.check_values(TrainConfig(model="m", data="d", output="o", head_lr_scale=0.0))
