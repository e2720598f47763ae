"""`manyrank files`: what comes with the project, shown and copied."""

import pytest

from manyrank.config.resolve import presets
from manyrank.errors import UserError
from manyrank.project_files import asset
from manyrank.tools import files


def test_every_recipe_is_listed_and_printed(capsys):
    files.main([])
    assert "launch/\n" in capsys.readouterr().out
    files.main(["launch/recipes"])
    names = capsys.readouterr().out.split()
    assert {f"launch/recipes/{name}.yaml" for name in presets()} == set(names)
    files.main([names[0]])
    assert capsys.readouterr().out == asset(*names[0].split("/")).read_text()


def test_a_folder_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.main(["copy", "launch"])
    assert capsys.readouterr().out == "copied to launch\n"
    own, copied = asset("launch"), tmp_path / "launch"
    assert {path.relative_to(own) for path in own.rglob("*.yaml")} == {
        p.relative_to(copied) for p in copied.rglob("*.yaml")
    }
    assert (copied / "local.sh").stat().st_mode & 0o100
    (copied / "local.sh").write_text("mine")
    with pytest.raises(UserError, match="launch exists"):
        files.main(["copy", "launch"])
    assert (copied / "local.sh").read_text() == "mine"
    files.main(["copy", "ds_configs/zero3.json", "own/mine.json"])
    assert (tmp_path / "own" / "mine.json").read_text() == asset("ds_configs", "zero3.json").read_text()


@pytest.mark.parametrize(
    "words", [["nosuch"], ["launch/../pyproject.toml"], ["src"], ["copy"], ["copy", "data/nosuch"], ["launch", "data"]]
)
def test_names_that_there_are_not(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        files.main(words)
    assert not list(tmp_path.iterdir())
