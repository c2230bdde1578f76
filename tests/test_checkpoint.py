"""Adapters on disk: complete, exact, atomic, and refused where they do not belong."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import noised

import jpeft
from jpeft.checkpoint import adapter as adapter_files
from jpeft.checkpoint.fingerprint import file_checksums, fingerprint

PARAMS = {
    "dense": {"kernel": jnp.arange(32.0).reshape(8, 4), "bias": jnp.zeros(4)},
    "classifier": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
}


@pytest.fixture
def saved(tmp_path):
    peft = jpeft.apply(PARAMS, method=jpeft.lora(rank=2))
    peft = peft.replace(adapter=noised(peft.adapter))
    jpeft.save(tmp_path / "out", peft)
    return tmp_path / "out", peft


def test_round_trip_keeps_every_bit_and_dtype(saved):
    path, peft = saved
    loaded = jpeft.load(path, PARAMS)
    assert loaded.method == peft.method
    chex.assert_trees_all_equal(loaded.adapter, peft.adapter)
    half = peft.replace(adapter=jax.tree.map(lambda x: x.astype(jnp.bfloat16), peft.adapter))
    jpeft.save(path.parent / "half", half)
    restored = jpeft.load(path.parent / "half", PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored.adapter, half.adapter)
    chex.assert_trees_all_equal(restored.adapter, half.adapter)


ODD = (
    "a[b]",
    "a*",
    "what?",
    "back\\slash",
    "sp ace\n",
    "é 日本",
    "gs:",
    "%20",
    "x" * 255,
    "d[0]/e/f",
    "not-utf8-\udcff",
    "5.orbax-checkpoint-tmp",
)


@pytest.mark.parametrize("name", ODD)
def test_any_path_will_do(tmp_path, name):
    peft = jpeft.apply(PARAMS, method=jpeft.lora(rank=2))
    peft = peft.replace(adapter=noised(peft.adapter))
    jpeft.save(tmp_path / name, peft)
    jpeft.save(tmp_path / name, peft, overwrite=True)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / name, PARAMS).adapter, peft.adapter)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_pattern_finds_no_other_adapter(tmp_path):
    """`a*` must not read what is in `ab`."""
    one, two = (jpeft.apply({"dense": {"kernel": jnp.full((8, 4), x)}}, method="freeze", target=".*") for x in (1.0, 2.0))
    jpeft.save(tmp_path / "ab" / "out", one)
    jpeft.save(tmp_path / "a*" / "out", two)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "a*" / "out", two.params).adapter, two.adapter)


def test_an_adapter_that_an_earlier_version_lost_is_found(saved):
    """Under a path with brackets it left out the index of the arrays, which are all there."""
    path, peft = saved
    shutil.rmtree(path / "adapter" / "d")
    (path / "adapter" / "manifest.ocdbt").unlink()
    record = json.loads((path / "jpeft.json").read_text())
    del record["checksum"]
    record["files"] = file_checksums(path / "adapter")
    (path / "jpeft.json").write_text(json.dumps(record))
    chex.assert_trees_all_equal(jpeft.load(path, PARAMS).adapter, peft.adapter)
    shutil.rmtree(path / "adapter" / "ocdbt.process_0")
    record["files"] = file_checksums(path / "adapter")
    (path / "jpeft.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="damaged or incomplete.*0 of 4 arrays"):
        jpeft.load(path, PARAMS)


def test_what_is_saved_is_read_back(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    restore = ocp.StandardCheckpointer.restore
    wrong = lambda *args, **more: jax.tree.map(lambda x: x + 1, restore(*args, **more))
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", wrong)
    with pytest.raises(OSError, match="is not what is read from there"):
        jpeft.save(tmp_path / "out", jpeft.apply(PARAMS, method="lora"))
    assert list(tmp_path.iterdir()) == []


def test_a_changed_record_is_named(saved):
    path, _ = saved
    record = json.loads((path / "jpeft.json").read_text())
    record["method"]["options"] = {**record["method"].get("options", {}), "alpha": 4.0}
    (path / "jpeft.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"jpeft.json was changed after jpeft wrote it"):
        jpeft.load(path, PARAMS)


def test_only_an_adapter_is_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds no adapter but thesis.tex, so it is not replaced"):
        jpeft.save(tmp_path, jpeft.apply(PARAMS, method="lora"), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory: .*file"):
        jpeft.save(tmp_path / "file" / "out", jpeft.apply(PARAMS, method="lora"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis.tex"]


def test_an_adapter_without_leaves(tmp_path):
    params = {"dense": PARAMS["dense"]}
    peft = jpeft.apply(params, method="freeze", top=0)
    assert peft.adapter == {}
    jpeft.save(tmp_path / "out", peft)
    loaded = jpeft.load(tmp_path / "out", params)
    assert (loaded.adapter, loaded.method) == ({}, peft.method)
    with pytest.raises(ValueError, match="another base"):
        jpeft.load(tmp_path / "out", {"dense": {**PARAMS["dense"], "bias": jnp.ones(4)}})


def test_the_base_is_not_saved(saved):
    path, _ = saved
    large = {"dense": {"kernel": jnp.ones((4096, 256)), "bias": jnp.zeros(256)}}
    jpeft.save(path.parent / "large", jpeft.apply(large, method=jpeft.lora(rank=1)))
    assert sum(f.stat().st_size for f in (path.parent / "large").rglob("*") if f.is_file()) < large["dense"]["kernel"].nbytes / 20


def test_another_head_is_no_other_base(saved):
    """The head is in the adapter; what random head the base was given this time does not matter."""
    path, peft = saved
    other = {**PARAMS, "classifier": jax.tree.map(lambda x: x + 1, PARAMS["classifier"])}
    chex.assert_trees_all_equal(jpeft.load(path, other).adapter, peft.adapter)


def test_another_base_is_refused(saved):
    path, peft = saved
    kernel = PARAMS["dense"]["kernel"]
    nearly = {**PARAMS, "dense": {**PARAMS["dense"], "kernel": kernel.at[3, 2].add(1e-6 * kernel[3, 2])}}
    with pytest.raises(ValueError, match="trained on another base.*check_base=False"):
        jpeft.load(path, nearly)
    chex.assert_trees_all_equal(jpeft.load(path, nearly, check_base=False).adapter, peft.adapter)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"other": PARAMS["dense"], "classifier": PARAMS["classifier"]}, "does not fit these parameters: .* missing.*left over"),
        (
            {**PARAMS, "dense": {"kernel": jnp.ones((9, 4)), "bias": jnp.zeros(4)}},
            r"'dense/kernel/a' has shape \[8, 2\], the base needs \[9, 2\]",
        ),
        (
            {**PARAMS, "more": {"kernel": jnp.ones((3, 3))}},
            "2 leaves are missing, such as .'more/kernel/a', 'more/kernel/b'., and 0 are left over",
        ),
        ({"classifier": PARAMS["classifier"]}, "does not fit these parameters"),
    ],
)
def test_other_parameters_are_refused(saved, params, message):
    with pytest.raises(ValueError, match=message):
        jpeft.load(saved[0], params, check_base=False)


def test_existing_directories_are_kept(saved):
    path, peft = saved
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        jpeft.save(path, peft)
    new = peft.replace(adapter=noised(peft.adapter))
    jpeft.save(path, new, overwrite=True)
    chex.assert_trees_all_equal(jpeft.load(path, PARAMS).adapter, new.adapter)
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        jpeft.save(tmp_path / "out", jpeft.apply(PARAMS, method="lora"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_overwrite_keeps_the_old_one(saved, monkeypatch):
    import orbax.checkpoint as ocp

    path, peft = saved

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            jpeft.save(path, peft.replace(adapter=noised(peft.adapter)), overwrite=True)
    chex.assert_trees_all_equal(jpeft.load(path, PARAMS).adapter, peft.adapter)


@pytest.mark.parametrize("place", ["_read_arrays", "damaged_files"])
def test_one_that_is_replaced_while_it_is_read_is_read_anew(saved, monkeypatch, place):
    """Another process may save in the midst of a load: nothing is mixed, and the files of the old one are not missed."""
    path, peft = saved
    new, read, times = peft.replace(adapter=noised(peft.adapter, seed=9)), getattr(adapter_files, place), []

    def replaced(*args):
        times.append(1)
        if len(times) == 1:
            jpeft.save(path, new, overwrite=True)
        return read(*args)

    monkeypatch.setattr(adapter_files, place, replaced)
    chex.assert_trees_all_equal(jpeft.load(path, peft.params).adapter, new.adapter)
    assert len(times) == 2
    (path / "jpeft.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):  # by nobody who is at work
        jpeft.load(path, peft.params)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter: jpeft.json is missing; there is nothing"):
        jpeft.load(tmp_path / "out", PARAMS)


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', "[]"])
def test_damaged_record(saved, content):
    path, _ = saved
    (path / "jpeft.json").write_text(content)
    with pytest.raises(ValueError, match="jpeft.json' is damaged"):
        jpeft.load(path, PARAMS)


def test_newer_format(saved):
    path, _ = saved
    record = json.loads((path / "jpeft.json").read_text())
    (path / "jpeft.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this jpeft reads format 1"):
        jpeft.load(path, PARAMS)


def test_every_damaged_data_file_is_found(saved):
    """Cut or flip a byte in each file of the Orbax directory in turn: an error, or, where the file does not matter, the same arrays."""
    path, peft = saved
    refused = 0
    for file in sorted(f for f in (path / "adapter").rglob("*") if f.is_file()):
        for damage in (lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-5] + bytes([raw[-5] ^ 255]) + raw[-4:]):
            copy = path.parent / "copy"
            shutil.copytree(path, copy)
            victim = copy / file.relative_to(path)
            if len(victim.read_bytes()) > 5:
                victim.write_bytes(damage(victim.read_bytes()))
            try:
                chex.assert_trees_all_equal(jpeft.load(copy, PARAMS).adapter, peft.adapter)
            except ValueError as error:
                assert "damaged" in str(error)
                refused += 1
            shutil.rmtree(copy)
    assert refused >= 3


def test_hand_made_methods_are_passed_in(tmp_path):
    class OneBias(jpeft.Method):
        name = "one_bias"

        def init(self, key, params, *, stats=None):
            return {"dense": {"bias": jnp.array(params["dense"]["bias"])}}

    method = OneBias()
    jpeft.save(tmp_path / "out", jpeft.apply(PARAMS, method=method))
    with pytest.raises(ValueError, match="hand-made method 'one_bias': pass it"):
        jpeft.load(tmp_path / "out", PARAMS)
    assert jpeft.load(tmp_path / "out", PARAMS, method=method).method == method


def test_fingerprint():
    tree = {"a": jnp.arange(6, dtype=jnp.float32), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.array([True, False])}
    same = jax.tree.map(np.array, tree)
    assert fingerprint(tree) == fingerprint(same)
    changes = [
        {**tree, "a": tree["a"][::-1]},  # order
        {**tree, "a": tree["a"].reshape(2, 3)},  # shape
        {**tree, "a": tree["a"].astype(jnp.int32)},  # dtype
        {**tree, "a": tree["a"].at[5].set(jnp.nextafter(jnp.float32(5), jnp.float32(6)))},  # the last bit
        {"a": tree["a"], "b": tree["b"], "d": tree["c"]},  # name
        {**tree, "a": tree["a"].at[0].set(-0.0)},  # sign of zero
    ]
    assert len({fingerprint(t) for t in [tree, *changes]}) == 7
    assert fingerprint(tree, skip=frozenset({"a"})) == fingerprint(changes[0], skip=frozenset({"a"}))


def test_a_part_may_have_the_name_of_a_module(tmp_path):
    """The parts of a chain are known from the method, not guessed from names: this adapter's path is encoder/encoder/kernel/a."""
    params = {"encoder": {"kernel": jnp.ones((8, 4))}, "classifier": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
    peft = jpeft.apply(params, method=jpeft.chain(encoder=jpeft.lora(rank=2)))
    jpeft.save(tmp_path / "out", peft.replace(adapter=noised(peft.adapter)))
    fresh_head = {**params, "classifier": jax.tree.map(lambda leaf: leaf + 1, params["classifier"])}
    assert jpeft.load(tmp_path / "out", fresh_head).method == peft.method
    with pytest.raises(ValueError, match="another base"):
        jpeft.load(tmp_path / "out", {**params, "encoder": {"kernel": jnp.zeros((8, 4))}})
