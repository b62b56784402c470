"""Properties of reading an export's results.json and config.json, which others may have written."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.hub.export import CHECKED, CONFIG, RESULTS, WEIGHTS, recorded_sha256
from advcl_hub.hub.projector_file import PROJECTOR
from advcl_hub.hub.registry import open_source
from tests.support.properties import DEEP, damaged, json_values

SHA256 = dict.fromkeys((*CHECKED, PROJECTOR), "0" * 64)
CONFIG_VALUES = {
    "architecture": "resnet8_cifar",
    "num_classes": 10,
    "model_args": {"stem": 1},
    "label_names": ["a", "b"],
    "pretrained_cfg": {"mean": [0.0], "tag": "x", "file": "/etc/passwd", "url": "https://x", "hf_hub_id": "a/b"},
}
contents = st.binary(max_size=20) | json_values.map(json.dumps).map(str.encode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    (path / WEIGHTS).write_bytes(b"never read here")
    return path


@given(st.dictionaries(st.sampled_from(sorted(SHA256)), json_values) | json_values)
@example(SHA256)
@example("config.json")
def test_the_recorded_sha256_are_of_all_files_or_refused(folder: Path, recorded: Any) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps({"sha256": recorded}), encoding="utf-8")
    try:
        found = recorded_sha256(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert {*CHECKED} <= found.keys() <= {*CHECKED, PROJECTOR} and (PROJECTOR in found) == (PROJECTOR in recorded)


@given(contents)
@example(DEEP.encode())
def test_another_record_is_refused_by_name(folder: Path, content: bytes) -> None:
    path = folder / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json is damaged"):
        recorded_sha256(path)


@given(damaged(CONFIG_VALUES).map(json.dumps).map(str.encode) | contents)
@example(DEEP.encode())
@example(json.dumps(CONFIG_VALUES).encode())
@example(json.dumps({**CONFIG_VALUES, "architecture": 5}).encode())
@example(json.dumps({**CONFIG_VALUES, "model_args": [1]}).encode())
@example(json.dumps({**CONFIG_VALUES, "pretrained_cfg": None}).encode())
@example(json.dumps({**CONFIG_VALUES, "label_names": 3}).encode())
def test_a_config_is_a_release_that_timm_can_register_or_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    assert not (folder / RESULTS).exists()
    try:
        release = open_source(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    cfg = release.cfg
    assert isinstance(release.architecture, str) and cfg.architecture == release.architecture
    assert cfg.file == str(folder / WEIGHTS) and not (cfg.url or cfg.state_dict or cfg.hf_hub_id or cfg.custom_load)
    assert "num_classes" not in release.model_args
