"""The Python of docs/use.md after a merge, run as it stands."""

import json
import re
import subprocess
import sys

import warm
from conftest import ROOT, launch

QUESTION = "What is the variance of a Bernoulli variable with p = 0.3?"


def test_the_merged_folder_answers_in_plain_transformers_as_the_docs_say(embedded_model, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "use.md").read_text(encoding="utf-8"), re.DOTALL)
    plain, retrieval = (next(block for block in blocks if word in block) for word in ("from_pretrained", "retrieve"))
    done = launch(tmp_path / "output" / "my", "--max_steps=2", "--strategy=single", cwd=tmp_path)
    assert done.code == 0, done.stderr
    run = [sys.executable, "-m", "manyrank.cli"]
    merged = warm.run([*run, "merge", "output/my"], cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    (tmp_path / "in.jsonl").write_text(f'{{"question": "{QUESTION}"}}\n')
    program = (
        "import sys\n"
        + plain
        + retrieval
        + (
            f"print('==')\nprint(answer({QUESTION!r}, lambda question: ['p = 0.3'], max_new_tokens=4))\n"
            "assert not {'manyrank', 'peft'} & {name.split('.')[0] for name in sys.modules if name == 'manyrank' or 'peft.tuners' in name}\n"
        )
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.split("==")
    assert first.strip() and second.strip() and "<|im_end|>" not in first
    command = [*run, "generate", "output/my", "in.jsonl", "out.jsonl", "--max-new-tokens", "64", "--dtype", "float32"]
    assert warm.run(command, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["answers"][0]["text"] == first.strip()
