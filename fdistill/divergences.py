"""f-divergences by name, and the weight $h(r) = r^2 f''(r)$ that each puts on the distribution-matching gradient."""

import difflib
import re
from collections.abc import Callable

from poise.fdistill.custom_divergences import from_function
from poise.fdistill.divergence_type import FDivergence, f_divergence, f_weight, scale
from poise.fdistill.named_divergences import NAMED, alpha, skew_js

__all__ = [
    "DIVERGENCES",
    "FDivergence",
    "alpha",
    "divergence",
    "f_divergence",
    "f_weight",
    "from_function",
    "scale",
    "skew_js",
]

_FAMILIES: dict[str, Callable[..., FDivergence]] = {"alpha": alpha, "skew_js": skew_js}
_ALIASES = {
    "rkl": "reverse_kl",
    "sf": "softened_reverse_kl",
    "soft": "softened_reverse_kl",
    "softened_rkl": "softened_reverse_kl",
    "js": "jensen_shannon",
    "sh": "squared_hellinger",
    "hellinger": "squared_hellinger",
    "kl": "forward_kl",
    "fkl": "forward_kl",
    "jf": "jeffreys",
    "pearson": "pearson_chi2",
    "neyman": "neyman_chi2",
    "le_cam": "triangular",
}

DIVERGENCES: tuple[str, ...] = tuple(NAMED)
"""The names of the divergences without a parameter."""


def divergence(name: str | FDivergence, **params: float | int) -> FDivergence:
    r"""The divergence of a name.

    ===================== ==================================== =======================
    name                  $f(r)$                               $h(r)=r^2f''(r)$
    ===================== ==================================== =======================
    reverse_kl            $-\log r$                            $1$
    softened_reverse_kl   $(r+1)\log\frac{r+1}{2r}$            $1/(r+1)$
    jensen_shannon        $r\log r-(r+1)\log\frac{r+1}{2}$     $r/(r+1)$
    squared_hellinger     $1-\sqrt r$                          $\sqrt r/4$
    forward_kl            $r\log r$                            $r$
    jeffreys              $(r-1)\log r$                        $r+1$
    pearson_chi2          $(r-1)^2$                            $2r^2$
    neyman_chi2           $(r-1)^2/r$                          $2/r$
    triangular            $(r-1)^2/(r+1)$                      $8r^2/(r+1)^3$
    alpha(a)              $\frac{r^a-ar-(1-a)}{a(a-1)}$        $r^a$
    skew_js(pi)           see :func:`skew_js`                  $\pi(1-\pi)r/(\pi r+1-\pi)$
    ===================== ==================================== =======================

    ``jensen_shannon`` is twice the usual Jensen-Shannon divergence, and ``softened_reverse_kl`` is
    $2KL(\frac{p+q}2\|p)$. The accepted short names are rkl, sf, soft, softened_rkl, js, sh, hellinger, kl, fkl, jf,
    pearson, neyman, le_cam.

    Args:
      name: a name of the table or a short name; a family takes its parameter as a keyword (``divergence("alpha",
        a=0.5)``) or in the name (``divergence("alpha(0.5)")``). An :class:`FDivergence` is returned as it is.
      **params: the family's parameter.

    Returns:
      The divergence.

    Raises:
      ValueError: for an unknown name, with the names that exist and the nearest; for total variation, which isn't
        twice differentiable; for a parameter out of its range.
      TypeError: for parameters that the divergence doesn't take.

    Example:
      >>> from poise.fdistill import divergence
      >>> divergence("js").name, divergence("alpha", a=1).name, divergence("skew_js(0.25)").weight_at_one
      ('jensen_shannon', 'forward_kl', 0.1875)

    References:
      Xu, Nie, Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681, Table 1,
      https://arxiv.org/abs/2502.15681. The first six rows are the paper's; its released code drops the factors 1/4
      (squared Hellinger) and 2 (Neyman), which a weight of mean 1 doesn't feel.
    """
    if isinstance(name, FDivergence):
        if params:
            raise TypeError(f"a divergence that is already built takes no parameters, got {sorted(params)}")
        return name
    if not isinstance(name, str):
        raise TypeError(f"name must be a string or an FDivergence, got {name!r}")
    key = name.strip().lower()
    call = re.fullmatch(r"(\w+)\(\s*(?:\w+\s*=\s*)?([-+.\deE]+)\s*\)", key)
    if call and call[1] in _FAMILIES:
        if params:
            raise TypeError(f"the parameter of {name!r} is in its name already, got {sorted(params)} too")
        return _FAMILIES[call[1]](float(call[2]))
    key = _ALIASES.get(key, key)
    if key in _FAMILIES:
        try:
            return _FAMILIES[key](**params)
        except TypeError as error:
            parameter = {"alpha": "a", "skew_js": "pi"}[key]
            raise TypeError(f"{key} takes the parameter {parameter} and no other, got {sorted(params)}") from error
    if key in NAMED:
        if params:
            raise TypeError(f"{key} takes no parameters, got {sorted(params)}")
        return NAMED[key]()
    if key in ("tv", "total_variation"):
        raise ValueError(
            "name: total variation is not twice differentiable, so it has no weight h(r) = r^2 f''(r); "
            "triangular bounds it from both sides and is"
        )
    known = [*NAMED, *_FAMILIES, *_ALIASES]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"name must be one of {', '.join([*NAMED, 'alpha(a)', 'skew_js(pi)'])} or a short name "
        f"({', '.join(_ALIASES)}), got {name!r}; the nearest is {nearest!r}"
    )
