"""Config files: layering, overrides, errors that name the key, the resolved copy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm_train.config import build_config, load_config, to_table
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse
from fastllm_train.toml_text import to_toml

MODEL = '[model]\npreset = "llama-10m"\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_base_is_relative_to_its_file_and_the_file_wins(tmp_path: Path) -> None:
    write(tmp_path / "plan/train.toml", MODEL + "[batch]\nmicro = 4\nglobal = 8\n")
    config = load_config(
        write(tmp_path / "configs/a.toml", 'base = "../plan/train.toml"\n[batch]\nglobal = 16\n')
    )
    assert (config.batch.micro, config.batch.global_size) == (4, 16)
    assert config.model.preset == "llama-10m"


def test_base_can_be_given_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "other.toml", MODEL + "[batch]\nmicro = 3\nglobal = 3\n")
    path = write(tmp_path / "configs/a.toml", 'base = "absent.toml"\n[batch]\nglobal = 6\n')
    monkeypatch.chdir(tmp_path)
    config = load_config(path, ["base=other.toml"])
    assert (config.batch.micro, config.batch.global_size) == (3, 6)


def test_override_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", MODEL + "[optim]\nlr = 1e-3\n")
    config = load_config(path, ["optim.lr=3e-4", "run.out=runs/a b", "parallel.dp=4"])
    assert (config.optim.lr, config.run.out, config.parallel.dp) == (3e-4, "runs/a b", 4)


def test_naming_a_model_another_way_replaces_the_base_s(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", MODEL)
    above = 'base = "base.toml"\n[model]\nhf_config = "x/config.json"\n'
    config = load_config(write(tmp_path / "a.toml", above))
    assert (config.model.preset, config.model.hf_config) == ("", "x/config.json")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optim.lrr=1", "unknown key optim.lrr", "did you mean optim.lr?"),
        ("optimm.lr=1", "unknown section optimm", "did you mean optim?"),
        ("optim.lr=fast", "optim.lr='fast' is not of type float", ""),
        ("parallel.dp=true", "parallel.dp=True is not of type int", ""),
        ("parallel.dp=0", "parallel.dp=0 is not a positive number", ""),
        ("schedule.kind=cosin", "schedule.kind='cosin' is not allowed", "did you mean cosine?"),
        ("optim.lr=-1", "optim.lr=-1.0 is not positive", ""),
        ("parallel.zero_stage=4", "parallel.zero_stage=4", "use 0, 1, 2 or 3"),
        ("schedule.warmup_steps=101", "schedule.warmup_steps=101 is not between", ""),
        ("lr=1", "'lr=1' is not section.key=value", "for example optim.lr=3e-4"),
    ],
)
def test_bad_value_names_the_key(tmp_path: Path, override: str, message: str, hint: str) -> None:
    path = write(tmp_path / "a.toml", MODEL)
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "is not TOML"),
        ('base = "nowhere.toml"\n', "nowhere.toml: No such file"),
        ('base = "a.toml"\n', "leads back to itself"),
        ("base = 3\n", "base must be the name of a file"),
        ("model = 3\n", "model is a table, not a value"),
        ("", "the model must be given once; found: none"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path / "a.toml", text))


def test_a_model_given_twice() -> None:
    with pytest.raises(UserError, match=r"found: model.preset and model.hf_config"):
        build_config({"model": {"preset": "llama-10m", "hf_config": "x"}})


def test_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "a.toml", '[model]\npreset = "llama-10n"\n'))
    with pytest.raises(UserError) as caught:
        config.model.resolve()
    assert "llama-10m" in caught.value.hint


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    table = tomllib.loads(MODEL + '[data]\npaths = ["a", "0.3", "b c"]\n[optim]\nlr = 1e-3\n')
    config = build_config(table)
    again = load_config(write(tmp_path / "r.toml", to_toml(to_table(config))))
    assert again == config


keys = st.text(min_size=1, max_size=8)
scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
tables = st.recursive(
    st.dictionaries(keys, scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, tables, max_size=3))
def test_toml_text_reads_back(table: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(table)) == table


BASE = {
    "model": {"preset": "llama-10m"},
    "batch": {"micro": 1, "global": 4, "seq_len": 64},
    "data": {"source": "synthetic"},
}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("batch", {"global": 5}, r"batch.global=5 is not a multiple .* 1\*2 = 2"),
        ("batch", {"seq_len": 4096}, "longer than the model's 512 positions"),
        ("data", {"source": "indexed"}, "data.paths is empty"),
        ("parallel", {"virtual_stages": 2}, "no interleaved schedule"),
        ("parallel", {"offload": "optimizer", "zero_stage": 0}, "zero_stage=0 has none"),
        ("parallel", {"offload": "optimizer+params"}, "needs zero_stage=3, not 1"),
        ("parallel", {"sequence_parallel": True}, "parallel.tp=1 has none"),
        ("schedule", {"min_lr": 1.0}, "is above optim.lr"),
    ],
)
def test_refused_before_anything_starts(
    section: str, values: dict[str, object], message: str
) -> None:
    table = {**BASE, "parallel": {"dp": 2, "zero_stage": 1}}
    table[section] = {**table.get(section, {}), **values}
    config = build_config(table)
    with pytest.raises(UserError, match=message):
        refuse(config, config.model.resolve())


def test_a_sound_config_is_not_refused() -> None:
    config = build_config({**BASE, "parallel": {"dp": 2}})
    refuse(config, config.model.resolve())
