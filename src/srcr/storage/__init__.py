"""Files: safetensors by tensor, folders that appear whole or not at all, and the journal of a run."""
