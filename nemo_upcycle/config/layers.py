"""Which layers become MoE layers."""

import ast

from nemo_upcycle.errors import UpcyclingError


def moe_layers(freq: int | str | tuple[int, ...] | list[int], num_layers: int) -> tuple[bool, ...]:
    """Return which layers become MoE layers; the others stay dense.

    Args:
        freq: N for every N-th layer, beginning with the first. Or a list with 0 (dense) or 1 per
            layer. Or a text: either of these; lists with `+` and `*` (`[0]*2+[1]*30`, Megatron-LM's
            `--moe-layer-freq`); or some of `every=N`, `skip_first=K` and `skip_last=K`, separated
            by commas. Semicolons mean commas, because NeMo-Run's command line splits at commas.
        num_layers: Layers of the model.

    Returns:
        One value per layer.

    Raises:
        UpcyclingError: `freq` has another form or number of layers, or leaves no MoE layer.
    """
    parsed = _parse(freq.replace(";", ","), num_layers) if isinstance(freq, str) else freq
    if isinstance(parsed, int):
        if parsed < 1:
            raise UpcyclingError(f"moe_layer_freq is {freq!r}; expected 1 or more.")
        pattern = [int(layer % parsed == 0) for layer in range(num_layers)]
    else:
        pattern = list(parsed)
    if len(pattern) != num_layers or not set(pattern) <= {0, 1}:
        raise UpcyclingError(
            f"moe_layer_freq is {freq!r}, which has {len(pattern)} layers; expected 0 or 1 for "
            f"each of the {num_layers} layers."
        )
    if not any(pattern):
        raise UpcyclingError(
            f"moe_layer_freq is {freq!r}, which leaves no MoE layer of {num_layers}; expected at "
            "least one (num_moe_experts=None keeps the model dense)."
        )
    return tuple(bool(value) for value in pattern)


def megatron_layer_freq(freq: int | str | tuple[int, ...], num_layers: int) -> int | list[int]:
    """Return Megatron's `moe_layer_freq`: 1 if all layers are alike, else a list of 0 and 1."""
    layers = moe_layers(freq, num_layers)
    return 1 if all(layers) else [int(layer) for layer in layers]


def _parse(text: str, num_layers: int) -> int | list[int]:
    if "=" in text:
        return _skipped(text, num_layers)
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise _unknown(text) from None


def _skipped(text: str, num_layers: int) -> list[int]:
    values = {"every": 1, "skip_first": 0, "skip_last": 0}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in values or not number.strip().isdecimal():
            raise _unknown(text)
        values[name.strip()] = int(number)
    first, every = values["skip_first"], values["every"]
    if every < 1:
        raise _unknown(text)
    stop = num_layers - values["skip_last"]
    return [int(first <= n < stop and (n - first) % every == 0) for n in range(num_layers)]


def _evaluate(node: ast.expr) -> int | list[int]:
    """Evaluate numbers, lists of them, + and *."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        values = [_evaluate(item) for item in node.elts]
        if all(isinstance(value, int) for value in values):
            return values  # type: ignore[return-value]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            return left * min(right, 10_000)
    raise ValueError


def _unknown(text: str) -> UpcyclingError:
    return UpcyclingError(
        f"moe_layer_freq is {text!r}; expected a number (every n-th layer), a list of 0 and 1 "
        "such as [0]*2+[1]*30, or skip_first=2,skip_last=1,every=2."
    )
