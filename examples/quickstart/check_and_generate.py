"""Compare a converted model with the trained one, then generate a line of text.

Usage: python check_and_generate.py RUN_FOLDER HF_FOLDER

The trained side is fastllm-train's own model with the weights of the newest checkpoint, read by
torch, not by the converter; the other side is ``transformers`` on the converted folder. Exits 1
when any logit differs by more than 1e-5 (fp32).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from fastllm_planner.arch import ArchSpec, read_hf_config
from fastllm_train.models.decoder import Decoder

TOLERANCE = 1e-5
PROMPT = "def read_lines(path):\n    "


def trained_model(run: Path) -> torch.nn.Module:
    """fastllm-train's model with the newest checkpoint's weights."""
    checkpoints = run / "checkpoints"
    spec: ArchSpec = read_hf_config(checkpoints)
    tag = (checkpoints / "latest").read_text(encoding="utf-8").strip()
    # A file this machine wrote a minute ago, with optimizer and RNG objects beside the weights.
    state = torch.load(
        checkpoints / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    model = Decoder(spec)
    model.load_state_dict(state["module"])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("hf", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    converted: Any = transformers.AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.hf)
    model = trained_model(args.run)
    vocab = json.loads((args.hf / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = torch.randint(vocab, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        error = (converted(tokens).logits - model(tokens, positions)).abs().max().item()
        agrees = error <= TOLERANCE
        word = "agree" if agrees else "DIFFER"
        print(f"logits {word}: max abs error {error:.1e} over {tokens.numel()} tokens (fp32)")
        prompt = tokenizer(PROMPT, return_tensors="pt")
        # Greedy with a repetition penalty: a model this young repeats itself otherwise.
        output = converted.generate(
            prompt["input_ids"], max_new_tokens=24, do_sample=False, repetition_penalty=1.3
        )
    print("generated:", json.dumps(tokenizer.decode(output[0], skip_special_tokens=True)))
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
