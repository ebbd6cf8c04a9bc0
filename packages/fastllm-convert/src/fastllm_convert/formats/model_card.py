"""``README.md`` of a converted model: what it is and where it came from."""

from __future__ import annotations

from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType
from fastllm_planner.arch import count_params


def model_card(source: Checkpoint, dtype: DType, version: str) -> bytes:
    """Markdown with the front matter the hub reads. No licence: the weights' owner says that."""
    spec = source.spec
    heads = f"{spec.heads} / {spec.kv_heads} of {spec.head_dim}"
    rows = [
        ("architecture", spec.family),
        ("parameters", f"{count_params(spec):,}"),
        ("layers", str(spec.layers)),
        ("hidden size", str(spec.hidden)),
        ("query / key-value heads", heads),
        ("feed-forward size", str(spec.moe.ffn_hidden if spec.moe else spec.ffn_hidden)),
        ("vocabulary", f"{spec.vocab:,}"),
        ("context length", f"{spec.max_seq_len:,}"),
        ("stored type", dtype.torch),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Converted model

Weights converted by fastllm-convert {version} from: {source.summary}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
""".encode()
