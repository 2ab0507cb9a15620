"""`torch.autocast("cuda")` on the pretend device, by the lists of torch's documentation for CUDA.

https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

LOWER = {
    *("__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "multi_dot"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum"),
    *("GRUCell", "linear", "LSTMCell", "matmul", "mm", "mv", "prelu", "RNNCell", "scaled_dot_product_attention"),
}
"""Functions that compute in the lower precision."""
FLOAT32 = {
    *("__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cosh"),
    *("cosine_embedding_loss", "cdist", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv"),
    *("exp", "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10"),
    *("log_softmax", "log1p", "log2", "margin_ranking_loss", "mse_loss", "nll_loss", "norm", "normalize", "pdist"),
    *("poisson_nll_loss", "pow", "prod", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss", "softmax", "softmin"),
    *("softplus", "sum", "renorm", "tan", "triplet_margin_loss", "interpolate"),
}
"""Functions that compute in float32."""
WIDEST = {"addcdiv", "addcmul", "atan2", "bilinear", "cat", "cross", "dot", "grid_sample", "index_put", "stack"}
"""Functions that compute in the widest dtype of their inputs."""
_HALVES = (torch.float16, torch.bfloat16)


def cast(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a function as autocast would cast them."""
    name = getattr(func, "__name__", "")
    if name in LOWER:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32:
        dtype = torch.float32
    elif name in WIDEST:
        floats = [one.dtype for one in tree_leaves((args, kwargs)) if _is_castable(one)]
        dtype = torch.float32 if torch.float32 in floats or not floats else floats[0]
    else:
        return args, kwargs

    def to(value: Any) -> Any:
        return value.to(dtype) if _is_castable(value) and value.dtype != dtype else value

    return tree_map(to, args), tree_map(to, kwargs)


def _is_castable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda" and value.dtype in (torch.float32, *_HALVES)
