"""The card of a final model, and the modes of what a run writes."""

import os

from huggingface_hub import ModelCard


def test_the_card_says_what_was_trained(whole_run):
    folder = whole_run.folder / "final_model"
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "peft" and set(card.data.tags) == {"sft", "lora", "manyrank"}
    assert card.data.base_model is None  # the embedded model is on no hub
    assert f"- last training loss: {whole_run.metrics()[-1]:.4g}" in card.text
    assert "- training: sample.jsonl (question_answer), " in card.text and "- steps: 6" in card.text
    assert not (whole_run.folder / "checkpoint-3" / "README.md").exists()  # peft writes an empty one
    assert str(whole_run.folder) not in card.text and "More Information Needed" not in card.text


def test_others_may_read_what_the_umask_lets_them(whole_run):
    umask = os.umask(0)
    os.umask(umask)
    for folder in (whole_run.folder / "final_model", whole_run.folder / "checkpoint-3"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert set(modes.values()) == {0o666 & ~umask} and any(name.endswith(".safetensors") for name in modes)
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
