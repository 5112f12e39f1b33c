"""What `config.json` may not say, looked at before transformers reads it and does what it says."""

from typing import Any

LARGEST_LAYERS = 1000  # more than any model has
# Of the first two transformers makes lists while it reads a config, of the others tables of rotations.
_LARGEST = {"num_hidden_layers": LARGEST_LAYERS, "num_labels": 2**16, "head_dim": 2**16, "qk_rope_head_dim": 2**16}


def check_config_text(content: Any, *, path: str) -> None:
    """Refuses numbers that take memory while a config is read, at any depth, and weights in a file of another name.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        ValueError: see above.
    """
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in _LARGEST and isinstance(value, int | float) and not value <= _LARGEST[name]:
            raise ValueError(
                f"'{path}' holds a value that the model cannot be made with: `{name}` must be an integer above 0 and "
                f"at most {_LARGEST[name]}, got {value!r:.40}. Write or download it again."
            )
        if name == "transformers_weights" and value is not None:
            raise ValueError(
                f"'{path}': `transformers_weights` names {value!r:.60} as the file of the weights, which is "
                "model.safetensors or those of its index. Remove it, and name the file so."
            )
        check_config_text(value, path=path)
