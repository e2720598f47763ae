"""Every chat template, and tokenizers that have no language but all of their markers."""

from importlib.resources import files

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manyrank.project_files import asset

OWN = {path.stem: path.read_text(encoding="utf-8") for path in asset("data", "templates").glob("*.jinja")}
PACKAGED = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
}
TEMPLATES = {f"own {name}": text for name, text in OWN.items()} | PACKAGED
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<|START_RESPONSE|>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<end_of_utterance>",
    "<turn|>",
    "<|turn>",
    "<|eot|>",
    "<|eom|>",
    "[INST]",
    "[/INST]",
]
ENDS = ("<|END_OF_TURN_TOKEN|>", "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|return|>")


def tokenizer_for(template: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and a few merges over edges: two newlines are one token, and so are a blank and the letter after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), *(("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")]
    vocabulary = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return with_markers(backend, template)


def with_markers(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    end = next((end for end in ENDS if end in template), "</s>")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, pad_token=end)
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    made.chat_template = template
    return made
