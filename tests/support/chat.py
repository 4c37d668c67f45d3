"""A language model and a tokenizer small enough for any test, with a chat template, and rows for them."""

import random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


WORDS = 24
SPECIAL = ("[PAD]", "[UNK]", "[EOS]", "<user>", "<assistant>", "<system>")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} [EOS]"
    "{% endgeneration %} {% else %}{{ m.content }} [EOS] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES = {"vocab_size": len(SPECIAL) + WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    text = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    text.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    made.chat_template = template
    return made


def llama(seed: int = 0, **config: object) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"pad_token_id": 0, "eos_token_id": 2} | config)).eval()


def words(draw: random.Random, least: int = 1, most: int = 6) -> str:
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(least, most)))


def conversations(count: int, seed: int = 0, turns: int = 2) -> dict[str, list]:
    """Rows of messages of the user and the assistant in turn."""
    draw = random.Random(seed)
    pairs = [("user", "assistant")[i % 2] for i in range(2 * turns)]
    return {"messages": [[{"role": role, "content": words(draw)} for role in pairs] for _ in range(count)]}


def pairs(count: int, seed: int = 0) -> dict[str, list]:
    """Rows of a prompt and a completion."""
    draw = random.Random(seed)
    return {
        name: [words(draw) + (" " if name == "prompt" else "") for _ in range(count)]
        for name in ("prompt", "completion")
    }
