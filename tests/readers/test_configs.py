"""Any JSON value at any key of a configuration gives a plan or a CheckpointError that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from halfbyte.checkpoints import plan
from halfbyte.checkpoints.configs import Config
from halfbyte.errors import CheckpointError
from support.checkpoints import read_checkpoint, write_checkpoint
from support.tiny_models import write_gpt_oss, write_modelopt_llama, write_qwen3_moe

#: Keys that dialects look at and that the written configurations lack or may lack.
KEYS = (
    "sparsity_config", "transform_config", "kv_cache_scheme", "quantization_status", "format", "ignore", "version",
    "config_groups", "exclude_modules", "quantized_layers", "kv_cache_quant_algo", "quant_algo", "group_size",
    "quant_method", "quantization", "output_activations", "symmetric", "dynamic", "targets", "text_config",
)  # fmt: skip
TEXTS = st.sampled_from(["dense", "NVFP4", "MIXED_PRECISION", "re:(", "re:a{9999999999}", "re:.*", "*", "16", "Linear"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=3),
    max_leaves=5,
)
#: compressed-tensors, ModelOpt in config.json and in its own file, gpt-oss.
DIALECTS = ("ct", "modelopt", "modelopt-own", "gpt-oss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configs")
    return {
        "ct": write_qwen3_moe(root / "ct"),
        "modelopt": write_modelopt_llama(root / "modelopt", in_config_json=True),
        "modelopt-own": write_modelopt_llama(root / "modelopt-own"),
        "gpt-oss": write_gpt_oss(root / "gpt-oss"),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in the tree, and of keys that could be there too."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
        yield from ((*path, key) for key in KEYS if key not in value)
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    inner = copy.get(path[0]) if isinstance(copy, dict) else copy[path[0]]
    copy[path[0]] = changed(inner, path[1:], new)
    return copy


def check_answer(folder: Path) -> None:
    """A plan, or an error that names the folder; hypothesis reports whatever else is raised."""
    message = str(folder)
    try:
        plan(folder)
    except CheckpointError as error:
        message = str(error)
    assert str(folder) in message


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:re", "ignore:.*:DeprecationWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_anywhere_in_the_description_is_a_plan_or_a_checkpoint_error(
    folders: dict[str, Path], dialect: str, data: st.DataObject
) -> None:
    folder = folders[dialect]
    file = folder / ("hf_quant_config.json" if dialect == "modelopt-own" else "config.json")
    written = file.read_bytes()
    whole = json.loads(written)
    root = ("quantization",) if dialect == "modelopt-own" else ("quantization_config",)
    path = root + data.draw(st.sampled_from(sorted(places(whole[root[0]]), key=repr)))
    try:
        file.write_text(json.dumps(changed(whole, path, data.draw(JSON))))
        check_answer(folder)
    finally:
        file.write_bytes(written)


@settings(max_examples=150, deadline=None)
@given(
    value=JSON, key=st.sampled_from(["num_local_experts", "num_experts_per_tok", "hidden_act", "dtype", "model_type"])
)
@example(value=10**12, key="num_local_experts")
@example(value=True, key="num_local_experts")
def test_any_value_that_describes_the_model_is_a_plan_or_a_checkpoint_error(
    folders: dict[str, Path], key: str, value: Any
) -> None:
    file = folders["ct"] / "config.json"
    written = file.read_bytes()
    try:
        for changes in ({key: value}, {key: None, "text_config": {key: value}}, {"text_config": value}):
            file.write_text(json.dumps({**json.loads(written), **changes}))
            check_answer(folders["ct"])
    finally:
        file.write_bytes(written)


def weights(**values: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": values, "targets": ["Linear"]}}}


@pytest.mark.parametrize(
    ("dialect", "changes", "message"),
    [
        ("ct", {"sparsity_config": "dense"}, "quantization_config.sparsity_config is 'dense', expected an object"),
        ("ct", {"transform_config": [1]}, r"quantization_config.transform_config is \[1\], expected an object"),
        ("ct", {"ignore": 3}, "quantization_config.ignore is 3, expected a list of strings"),
        ("ct", {"ignore": "re:.*"}, "quantization_config.ignore is 're:.*', expected a list of strings"),
        ("ct", {"format": 4}, "quantization_config.format is 4, expected a string"),
        ("ct", {"quantization_status": ["x"]}, "quantization_config.quantization_status is .*expected a string"),
        ("ct", {"quant_method": 3}, "quantization_config.quant_method is 3, expected a string"),
        ("ct", weights(num_bits="4"), "config_groups.group_0.weights.num_bits is '4', expected an integer"),
        ("ct", weights(num_bits=True), "config_groups.group_0.weights.num_bits is True, expected an integer"),
        ("modelopt", {"config_groups": {"a": {"weights": "x"}}}, "config_groups.a.weights is 'x', expected an object"),
        ("modelopt", {"group_size": "16"}, "quantization_config.group_size is '16', expected an integer"),
        ("modelopt", {"ignore": {"lm_head": 1}}, "quantization_config.ignore is .* expected a list of strings"),
        ("modelopt", {"quantization": 1}, "quantization_config.quantization is 1, expected an object"),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_file_key_and_value(
    folders: dict[str, Path], tmp_path: Path, dialect: str, changes: dict[str, Any], message: str
) -> None:
    config, tensors = read_checkpoint(folders[dialect])
    config["quantization_config"].update(changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        plan(write_checkpoint(tmp_path, config, tensors))


def test_null_is_as_good_as_absent(folders: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = read_checkpoint(folders["ct"])
    before = [layer.problem for layer in plan(folders["ct"]).layers]
    keys = ("quantization_status", "sparsity_config", "transform_config", "kv_cache_scheme", "format")
    config["quantization_config"].update(dict.fromkeys(keys))
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = None
    config["text_config"] = None
    assert [layer.problem for layer in plan(write_checkpoint(tmp_path, config, tensors)).layers] == before


def test_what_the_whole_says_counts_above_what_it_says_of_its_language_model() -> None:
    config = Config(Path("config.json"), {"a": 1, "b": None, "text_config": {"a": 2, "b": 3, "c": 4}})
    both = config.with_text_config()
    assert [both.integer(key) for key in ("a", "b", "c", "d")] == [1, 3, 4, None]
    assert both.integer("d", "c") == 4


def test_json_that_is_too_deep_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    _, tensors = read_checkpoint(folders["ct"])
    write_checkpoint(tmp_path, {}, tensors)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        plan(tmp_path)
