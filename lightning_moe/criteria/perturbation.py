"""Paper A's perturbation, shared by its first-order criteria."""

# Paper A multiplies the experts' outputs by alpha and reads the gradient there; this is its published value.
DEFAULT_ALPHA = 0.9


def first_order_factor(*, alpha: float) -> float:
    """`2 alpha (1 - alpha)`: what paper A's product of activation and gradient carries (method, 1).

    The relative squared error of an output scaled by alpha is `(1 - alpha)^2 ||R||^2 q`; its derivative with respect to
    a part of R, times that part as the perturbed model holds it (alpha of it), gives the factor.

    Raises:
        ValueError: `alpha` is not strictly between 0 and 1.

    Examples:
        >>> round(first_order_factor(alpha=0.9), 4)  # 2 * 0.9 * 0.1
        0.18
    """
    if not 0 < alpha < 1:
        raise ValueError(f"`alpha` must be between 0 and 1, both excluded, got {alpha}. The paper's value is 0.9.")
    return 2 * alpha * (1 - alpha)
