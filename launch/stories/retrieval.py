"""Answer questions from passages with a tuned model: find the passages by TF-IDF, put them into the prompt, complete it.

    launch/stories/retrieval.py RUN PASSAGES QUESTION [QUESTION ...]

PASSAGES is a text file with a passage a line. A model learns to read passages, and to pass over those that say nothing of the
question, from rows whose question is such a prompt: write them with `Index` and `prompt`, from passages of your own.
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path

PASSAGES = 3  # in a prompt


class Index:
    """Passages as vectors of TF-IDF, scaled to length 1, so that a product is the cosine of an angle."""

    def __init__(self, passages: list[str]) -> None:
        self.passages = passages
        counts = [Counter(words(passage)) for passage in passages]
        having = Counter(word for count in counts for word in count)  # passages that have the word
        self.weights = {word: math.log(1 + len(passages) / number) for word, number in having.items()}
        self.vectors = [self._vector(count) for count in counts]

    def search(self, question: str, number: int = PASSAGES) -> list[str]:
        """The passages nearest to a question, the nearest first."""
        asked = self._vector(Counter(words(question)))
        scores = [sum(value * vector.get(word, 0.0) for word, value in asked.items()) for vector in self.vectors]
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [self.passages[place] for place in order[:number]]

    def _vector(self, count: Counter) -> dict[str, float]:
        weighted = {word: times * self.weights[word] for word, times in count.items() if word in self.weights}
        length = math.sqrt(sum(value**2 for value in weighted.values())) or 1.0
        return {word: value / length for word, value in weighted.items()}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def prompt(question: str, passages: list[str]) -> str:
    return "\n".join(["Answer from these passages.", *passages, f"Question: {question}"])


def complete(model, tokenizer, text: str) -> str:
    """The model's answer to one message; with `manyrank serve RUN`, client.chat.completions.create in its place."""
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs.to(model.device), max_new_tokens=64, do_sample=False)
    return tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(run: str, file: str, *questions: str) -> None:
    from manyrank import load_model

    index = Index(Path(file).read_text(encoding="utf-8").splitlines())
    model, tokenizer = load_model(run)
    for question in questions:
        text = prompt(question, index.search(question))
        print(f"{text}\n  {complete(model, tokenizer, text)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
