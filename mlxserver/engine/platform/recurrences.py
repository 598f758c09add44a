"""Recurrences of hybrid models, Mamba-2 and the gated delta rule, as mlx-lm's functions: on CUDA with the kernel of
cuda_recurrence.py, on a CPU with native ones, which are for float32.

mlx-lm has kernels for Metal. Elsewhere the gated delta rule is a loop over the tokens, of ten operations each: a chunk
of 1,024 tokens is 10,000 operations per layer, at some ten microseconds of the host each.

Rule: what supports() refuses is left to mlx-lm's functions.
"""

from __future__ import annotations

from mlxserver.engine.mlx import mx

from mlx_lm.models import gated_delta, ssm

from mlxserver.engine.platform import cuda_recurrence, device
from mlxserver.engine.platform.model_code import rebind
from mlxserver.engine.platform.native.extension import native

mlx_lm_ssm_update = ssm.ssm_update
mlx_lm_gated_delta_update = gated_delta.gated_delta_update


def ssm_update(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As mlx_lm.models.ssm.ssm_update. lengths: as the mask has them."""
    heads = hidden_states.shape[2:3]
    if (
        supports(B, C, hidden_states, state, mask, [A_log, D, dt, dt_bias])
        and D.shape == A_log.shape == dt_bias.shape == heads
        and (lengths is None or mask is not None)
    ):
        limits = time_step_limit[0], time_step_limit[1]
        if kernels := native():
            return kernels.mamba(  # type: ignore[no-any-return]
                hidden_states, B, C, dt, A_log, dt_bias, D, *limits, state, mask
            )
        parameters = (A_log, dt_bias, D)
        return cuda_recurrence.mamba(hidden_states, B, C, dt, parameters, limits, state, mask)
    return mlx_lm_ssm_update(  # type: ignore[no-any-return]
        hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths
    )


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """As mlx_lm.models.gated_delta.gated_delta_update."""
    heads, key_dim = v.shape[2], k.shape[3]
    sizes = a.shape[2:], dt_bias.shape, A_log.shape
    if (
        use_kernel
        and supports(k, q, v, state, mask, [a, b, A_log, dt_bias])
        and sizes in (((heads,),) * 3, ((heads, key_dim), (heads, key_dim), (heads, 1)))
    ):
        most = 2 if allow_neg_eigval else 1
        if kernels := native():
            return kernels.gated_delta(  # type: ignore[no-any-return]
                q, k, v, a, b, A_log, dt_bias, most, lower_bound, state, mask
            )
        gates, parameters = (a, b), (A_log, dt_bias)
        return cuda_recurrence.gated_delta(q, k, v, gates, parameters, state, mask, lower_bound=lower_bound, most=most)
    return mlx_lm_gated_delta_update(  # type: ignore[no-any-return]
        q,
        k,
        v,
        a,
        b,
        A_log,
        dt_bias,
        state,
        mask,
        use_kernel=use_kernel,
        lower_bound=lower_bound,
        allow_neg_eigval=allow_neg_eigval,
    )


def supports(
    keys: mx.array,
    queries: mx.array,
    values: mx.array,
    state: mx.array | None,
    mask: mx.array | None,
    others: list[mx.array],
) -> bool:
    """Whether the kernel can have these, as far as their shapes and types say it.

    keys, queries: [B, T, groups, key dim]. values: [B, T, heads, dim]. others: of any float type.
    """
    types = _types()
    return (
        bool(types)
        and keys.shape == queries.shape
        and values.shape[2] % keys.shape[2] == 0
        and cuda_recurrence.lanes(keys.shape[3]) is not None
        and all(array.dtype in types for array in (keys, queries, values, *others))
        and (state is None or state.dtype == mx.float32)
        and (mask is None or (mask.dtype == mx.bool_ and mask.shape == values.shape[:2]))
    )


def _types() -> tuple[mx.Dtype, ...]:
    """The types of numbers that a kernel of this device can have; none where there is no kernel."""
    if device.describe().kind == "cuda":
        return mx.float32, mx.bfloat16, mx.float16
    return (mx.float32,) if native() else ()


def replace_functions() -> None:
    """Have the model code of mlx-lm, as far as it is imported, call these functions in place of its own."""
    rebind("ssm_update", mlx_lm_ssm_update, ssm_update)
    rebind("gated_delta_update", mlx_lm_gated_delta_update, gated_delta_update)
