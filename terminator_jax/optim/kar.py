"""Kar2 and Kar3: the signs of the gradient and of its running averages, added up.

Both come from the Terminator (Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full
Context Interaction", https://arxiv.org/abs/2401.17948). Neither has weight decay. A bias
correction would not change a sign.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from terminator_jax.ops.dtypes import at_least_float32


class ScaleByKar2State(NamedTuple):
    """State of Kar2.

    Attributes:
        mu: running average of the gradients, a tree like the parameters.
    """

    mu: optax.Updates


class ScaleByKar3State(NamedTuple):
    """State of Kar3.

    Attributes:
        mu1: fast running average of the gradients, a tree like the parameters.
        mu2: slow running average of the gradients, a tree like the parameters.
    """

    mu1: optax.Updates
    mu2: optax.Updates


def _check_beta(name: str, beta: Any) -> None:
    """Raises ValueError if `beta` is a known number outside [0, 1)."""
    if not isinstance(beta, jax.core.Tracer) and not 0 <= beta < 1:
        raise ValueError(f"{name} must be in [0, 1), got {beta}")


def _zeros(params: optax.Params, dtype: Any) -> optax.Updates:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)


def _signs(grads: optax.Updates, *averages: optax.Updates) -> optax.Updates:
    """Computes sign g + Σ sign m, in the dtype of g."""
    return jax.tree.map(
        lambda g, *ms: sum((jnp.sign(m).astype(g.dtype) for m in ms), jnp.sign(g)), grads, *averages
    )


def _average(grads: optax.Updates, average: optax.Updates, beta: Any) -> optax.Updates:
    """Computes β m + (1 - β) g in float32 or float64, and returns it in the dtype of m."""

    def leaf(g, m):
        wide = at_least_float32(jnp.float64 if g.dtype == jnp.float64 else m.dtype)
        return (beta * m.astype(wide) + (1 - beta) * g.astype(wide)).astype(m.dtype)

    return jax.tree.map(leaf, grads, average)


def scale_by_kar2(
    beta: jax.typing.ArrayLike = 0.95, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replaces the gradient by the sum of its sign and the sign of its running average.

    See :func:`kar2` for the maths.

    Args:
        beta: decay rate of the running average, in [0, 1).
        mu_dtype: dtype of the running average; that of the parameters if None.

    Returns:
        An `optax.GradientTransformation`. Updates keep the dtype of the gradients.

    Raises:
        ValueError: if `beta` is outside [0, 1).
    """
    _check_beta("beta", beta)

    def init_fn(params):
        return ScaleByKar2State(mu=_zeros(params, mu_dtype))

    def update_fn(updates, state, params=None):
        del params
        return _signs(updates, state.mu), ScaleByKar2State(mu=_average(updates, state.mu, beta))

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_kar3(
    beta1: jax.typing.ArrayLike = 0.5,
    beta2: jax.typing.ArrayLike = 0.95,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient by the sum of its sign and the signs of two running averages.

    See :func:`kar3` for the maths.

    Args:
        beta1: decay rate of the first, fast running average, in [0, 1).
        beta2: decay rate of the second, slow running average, in [0, 1).
        mu_dtype: dtype of the running averages; that of the parameters if None.

    Returns:
        An `optax.GradientTransformation`. Updates keep the dtype of the gradients.

    Raises:
        ValueError: if `beta1` or `beta2` is outside [0, 1).
    """
    _check_beta("beta1", beta1)
    _check_beta("beta2", beta2)

    def init_fn(params):
        return ScaleByKar3State(mu1=_zeros(params, mu_dtype), mu2=_zeros(params, mu_dtype))

    def update_fn(updates, state, params=None):
        del params
        new_state = ScaleByKar3State(
            mu1=_average(updates, state.mu1, beta1), mu2=_average(updates, state.mu2, beta2)
        )
        return _signs(updates, state.mu1, state.mu2), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def kar2(
    learning_rate: optax.ScalarOrSchedule,
    beta: jax.typing.ArrayLike = 0.95,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes Kar2: steps along the sign of the gradient plus the sign of its running average.

    Let :math:`\eta` be the learning rate, :math:`g_t` the gradient and :math:`m_0 = 0`. Then

    .. math::

        \begin{align*}
        \theta_t &= \theta_{t-1} - \eta_t \, (\operatorname{sign} g_t
            + \operatorname{sign} m_{t-1}) \\
        m_t &= \beta \, m_{t-1} + (1 - \beta) \, g_t
        \end{align*}

    with :math:`\operatorname{sign} 0 = 0`. The step uses the average from before this gradient.
    So a parameter moves by :math:`0, \eta` or :math:`2\eta`, and by :math:`2\eta` only where the
    gradient agrees with its past.

    Args:
        learning_rate: a number, or a schedule from the step's count to one.
        beta: decay rate of the running average, in [0, 1).
        mu_dtype: dtype of the running average; that of the parameters if None.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: if `beta` is outside [0, 1).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from terminator_jax.optim import kar2
        >>> solver = kar2(learning_rate=0.125)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = solver.init(params)
        >>> for _ in range(3):
        ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
        ...     updates, state = solver.update(gradient, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params)
        [ 0.875 -1.875]
        [ 0.625 -1.625]
        [ 0.375 -1.375]

    References:
        Zhang, `HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction
        <https://arxiv.org/abs/2401.17948>`_, 2024

    .. seealso:: :func:`kar3`, :func:`optax.sign_sgd`, :func:`optax.lion`
    """
    return optax.chain(
        scale_by_kar2(beta, mu_dtype=mu_dtype), optax.scale_by_learning_rate(learning_rate)
    )


def kar3(
    learning_rate: optax.ScalarOrSchedule,
    beta1: jax.typing.ArrayLike = 0.5,
    beta2: jax.typing.ArrayLike = 0.95,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes Kar3: steps along the sign of the gradient plus the signs of two running averages.

    Let :math:`\eta` be the learning rate, :math:`g_t` the gradient and
    :math:`m^{(1)}_0 = m^{(2)}_0 = 0`. Then

    .. math::

        \begin{align*}
        \theta_t &= \theta_{t-1} - \eta_t \, (\operatorname{sign} g_t
            + \operatorname{sign} m^{(1)}_{t-1} + \operatorname{sign} m^{(2)}_{t-1}) \\
        m^{(1)}_t &= \beta_1 \, m^{(1)}_{t-1} + (1 - \beta_1) \, g_t \\
        m^{(2)}_t &= \beta_2 \, m^{(2)}_{t-1} + (1 - \beta_2) \, g_t
        \end{align*}

    with :math:`\operatorname{sign} 0 = 0`. The step uses the averages from before this gradient.
    So a parameter moves by up to :math:`3\eta`, and by that much only where the gradient agrees
    with its recent and with its older past.

    Args:
        learning_rate: a number, or a schedule from the step's count to one.
        beta1: decay rate of the first, fast running average, in [0, 1).
        beta2: decay rate of the second, slow running average, in [0, 1).
        mu_dtype: dtype of the running averages; that of the parameters if None.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: if `beta1` or `beta2` is outside [0, 1).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from terminator_jax.optim import kar3
        >>> solver = kar3(learning_rate=optax.linear_schedule(0.25, 0.0, 4))
        >>> params = jnp.array([1.0, -2.0])
        >>> state = solver.init(params)
        >>> for _ in range(3):
        ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
        ...     updates, state = solver.update(gradient, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params)
        [ 0.75 -1.75]
        [ 0.1875 -1.1875]
        [-0.1875 -0.8125]

    References:
        Zhang, `HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction
        <https://arxiv.org/abs/2401.17948>`_, 2024

    .. seealso:: :func:`kar2`, :func:`optax.sign_sgd`, :func:`optax.lion`
    """
    return optax.chain(
        scale_by_kar3(beta1, beta2, mu_dtype=mu_dtype), optax.scale_by_learning_rate(learning_rate)
    )
