"""Train a tiny StableLM on English prose, finetune a copy on Python code, and save both: FOLDER/base, FOLDER/ft.

Both texts come with every CPython (its reference manual in `pydoc_data`, its `argparse`). About 40 s on two cores.
"""

import inspect
import sys
from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM

LENGTH, BATCH = 128, 16


def train(model: StableLmForCausalLM, tokens: torch.Tensor, steps: int, lr: float) -> None:
    """Plain next-token training on random windows of `tokens`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
        loss = cross_entropy(model(batch[:, :-1], use_cache=False).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  {steps} steps, last loss {loss.item():.2f}")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    prose, code = "\n\n".join(topics.values()), inspect.getsource(sys.modules[ArgumentParser.__module__])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([prose, code], vocab_size=1024, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    config = StableLmConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = StableLmForCausalLM(config)
    for name, text, steps, lr in (("base", prose, 150, 2e-3), ("ft", code, 60, 5e-4)):
        print(f"training {name} on {'prose' if text is prose else 'code'}")
        train(model, torch.tensor(tokenizer(text)["input_ids"]), steps, lr)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
