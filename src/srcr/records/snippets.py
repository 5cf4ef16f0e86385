"""How a compressed checkpoint is loaded and served, by its format, for its card."""

from srcr.records.run import RunRecord

_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```
"""
_SRCR = """```python
import srcr  # {why}
from transformers import AutoTokenizer

model = srcr.load("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```
"""
_VLLM = """
vLLM documents this layout:

```
vllm serve path/to/this/folder
```
"""
_LLAMA_CPP = """
In llama.cpp and what is built on it:

```
llama-cli -m path/to/this/folder/model.gguf -p "Once upon a time"
```
"""
_GPTQ = """
With [GPTQModel](https://github.com/ModelCloud/GPTQModel), codes as they are stored:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("path/to/this/folder")
```
"""
_ARCHIVE = """
No engine runs an archive; this writes what one does, to the same codes and scales:

```
srcr export path/to/this/folder --format compressed-tensors -o unpacked
```
"""


def usage(record: RunRecord) -> str:
    """Markdown: from Python, and in the engines that read the format."""
    if record.format == "gguf":
        return _SRCR.format(why="as plain weights, for comparisons") + _LLAMA_CPP
    if record.format == "archive":
        return _SRCR.format(why="as plain weights") + _ARCHIVE
    if record.format == "gptq":
        return _SRCR.format(why="as plain weights") + _GPTQ
    if record.loader == "srcr":
        return _SRCR.format(why="transformers alone does not load packed embeddings")
    served = record.rates.engine == "vllm" or record.format == "dense"
    return _TRANSFORMERS + (_VLLM if served else "")
