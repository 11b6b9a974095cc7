from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from modelyard.program.settings import Settings, SettingsError, YamlFile, load, table


class Inner(Settings):
    size: int = Field(3, ge=1, description="How many.")
    names: list[str] = Field(default_factory=list, description="Which.")


class Outer(Settings):
    host: str = Field("127.0.0.1", description="Where.")
    verbose: bool = Field(False, description="Talk.")
    inner: Inner = Inner()


def read(tmp_path: Path, *argv: str, env: dict[str, str] | None = None, text: str | None = None) -> Outer:
    if text is not None:
        (tmp_path / "modelyard.yaml").write_text(text)
    return load(Outer, program="p", section="outer", description="d", argv=argv, env=env or {}, cwd=tmp_path)


def test_later_layers_win(tmp_path: Path) -> None:
    text = "outer:\n  host: file\n  inner: {size: 5, names: [a]}\n"
    assert read(tmp_path, text=text) == Outer(host="file", inner=Inner(size=5, names=["a"]))
    env = {"MODELYARD_OUTER_INNER__SIZE": "7", "MODELYARD_OUTER_HOST": "env"}
    assert read(tmp_path, env=env) == Outer(host="env", inner=Inner(size=7, names=["a"]))
    assert read(tmp_path, "--host", "flag", "--inner.names", "[x, y]", "--verbose", env=env) == Outer(
        host="flag", verbose=True, inner=Inner(size=7, names=["x", "y"])
    )


def test_an_absent_default_file_is_no_error_but_a_named_one_is(tmp_path: Path) -> None:
    assert read(tmp_path) == Outer()
    with pytest.raises(SettingsError, match=r"gone\.yaml: cannot be read"):
        read(tmp_path, "--config", str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("outer:\n  inner:\n    size: 0\n", r"modelyard\.yaml:3: outer\.inner\.size: .*greater than or equal to 1"),
        ("outer:\n  hots: x\n", r"modelyard\.yaml:2: outer\.hots: unknown setting, perhaps 'host'"),
        ("outer: {}\ncontrolplane: {}\n", r"modelyard\.yaml:2: controlplane: unknown section, perhaps 'control_plane'"),
        ("outer: 3\n", r"modelyard\.yaml:1: outer: must be a mapping"),
        ("outer:\n  host: [\n", r"modelyard\.yaml:3: not valid YAML"),
        ("- outer\n", r"modelyard\.yaml:1: must be a mapping"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        read(tmp_path, text=text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("outer:\n  host: 2024-13-45\n", r":2: not valid YAML: not a timestamp: month must be"),
        ("outer:\n  host: 2001-01-01 25:61:61\n", r":2: not valid YAML: not a timestamp"),
        ("outer:\n  host: " + "1" * 5000 + "\n", r":2: not valid YAML: not a int"),
        ("outer:\n  verbose: !!bool perhaps\n", r":2: not valid YAML: not a bool"),
        ("outer: !!timestamp soon\n", r":1: not valid YAML: not a timestamp"),
        ("outer: " + "[" * 3000 + "\n", r"modelyard\.yaml: not valid YAML: nested too deeply"),
        ("outer: " + "{a: " * 3000 + "\n", r"modelyard\.yaml: not valid YAML: nested too deeply"),
        ("outer:\n  host: a\x00b\n", r":2: not valid YAML: character '\\x00' is not allowed"),
        ("outer:\n  host: a\n  host: b\n", r":3: not valid YAML: duplicate key 'host'"),
        ("outer: {}\nouter: {}\n", r":2: not valid YAML: duplicate key 'outer'"),
        ("outer:\n  ? [a, b]\n  : {}\n", r":2: not valid YAML: found unhashable key"),
        ("outer: !!python/object:os.system {}\n", r":1: not valid YAML: could not determine a constructor"),
        ("outer: {}\n---\nouter: {}\n", r":2: not valid YAML: but found another document"),
    ],
)
def test_every_unreadable_document_is_a_settings_error(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        read(tmp_path, text=text)


def test_binary_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "modelyard.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(SettingsError, match=r"modelyard\.yaml: cannot be read"):
        read(tmp_path)


def test_a_merge_may_be_overridden(tmp_path: Path) -> None:
    text = "x-base:\n  deep: &b {<<: &a {host: a, verbose: true}, host: b}\nouter: {<<: *b, host: c}\n"
    assert read(tmp_path, text=text) == Outer(host="c", verbose=True)


def test_an_unreadable_flag_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--inner\.names: not valid YAML"):
        read(tmp_path, "--inner.names", "[2024-13-45]")


def test_a_mistake_elsewhere_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"MODELYARD_OUTER_INNER__SIZE: .*got 'many'"):
        read(tmp_path, env={"MODELYARD_OUTER_INNER__SIZE": "many"})
    with pytest.raises(SettingsError, match=r"--inner\.size: "):
        read(tmp_path, "--inner.size", "0")


def test_every_setting_is_in_the_table() -> None:
    text = table(Outer, "outer")
    for key in ("`host`", "`verbose`", "`inner.size`", "`inner.names`"):
        assert key in text
    assert "MODELYARD_OUTER_INNER__SIZE" in text


def test_yaml_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a:\n  - b: 1\n  - c: 2\n    d: 3\n")
    document = YamlFile(path)
    assert document.line(["a", 1, "d"]) == 4
    assert document.line(["a", 1, "missing"]) == 3
