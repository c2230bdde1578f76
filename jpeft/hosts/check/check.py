"""The check itself: five questions, each a function that returns what it found."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.method import Method
from jpeft.core.peft import Peft, merge
from jpeft.hosts.base import Host
from jpeft.hosts.check.cost import gradient_cost
from jpeft.hosts.check.reach import reach_of
from jpeft.hosts.check.report import Finding, Report, named
from jpeft.hosts.check.subject import Subject, floats, noised, subject
from jpeft.tree.paths import flatten


def check(model: Any, peft: Peft, *inputs: Any, host: str | Host = "auto", **keywords: Any) -> Report:
    """Check that a method does on a model what it should: before a training run, or when a model of your own is new.

    It runs the model a few times and says

    * whether a new adapter leaves the outputs as they are, for a method that promises that;
    * whether every leaf of the adapter has a gradient once there is noise on all of them, and which have none;
    * whether merged parameters give the outputs of the wrapped model, or why the method does not merge;
    * what the gradient costs, in forward passes: 2 and what the adapter itself takes, where full fine-tuning takes 3; and which layers are
      dearer than that;
    * which parameters the method adapts, which it leaves, and which the model does not read.

    Args:
      model: What `jpeft.wrap` takes: ``model.apply``, a linen module, a model of another host, or any function of parameters.
      peft: Of `jpeft.apply`. A trained adapter will do, too: what a new adapter does is looked at with one.
      *inputs: A small batch, as the model is given it in evaluation; random numbers will do.
      host: As for `jpeft.wrap`.
      **keywords: Further arguments of the model; ``collections=`` as for `jpeft.wrap`.

    Returns:
      A `Report`: print it, ask it for `ok`, or let it `raise_if_bad`.

    Raises:
      ValueError: if the model cannot be run with the method at all, with the reason.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> peft = jpeft.apply(model.init(jax.random.key(0), x)["params"], method="lora", rank=2)
    >>> jpeft.check(model, peft, x).ok
    True
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checked = subject(model, peft, inputs, keywords, host)
        found, fields = _look(checked)
    texts = dict.fromkeys(str(each.message) for each in said if issubclass(each.category, UserWarning))
    return Report(peft.method, (*found, *(Finding("warning", "-", text) for text in texts)), **fields)


def _look(checked: Subject) -> tuple[list[Finding], dict[str, Any]]:
    params = checked.peft.params
    run, gradient = (program.lower().compile() for program in (checked.base_program, checked.gradient_program))
    base, noisy = run(params), noised(checked.peft.adapter, checked.trained)
    grads, out = gradient(noisy, params)
    effect = distance(out, base)
    begins, of_begin = _begins(checked, base, gradient)
    dead, of_learning = _learns(checked, grads, effect)
    apart, of_merge = _merges(checked, run, noisy, out)
    cost, read = gradient_cost(checked), reach_of(checked.program.jaxpr, noisy, params)
    adapted, _, added = checked.places
    left = tuple(path for path, leaf in flatten(params).items() if path not in adapted and _is_matrix(path, leaf))
    unread = tuple(path for path in read.unread if path not in adapted)  # a parameter that is replaced is not read
    price = f"a gradient takes {cost.passes:.3g} forward passes, and needs {cost.needed / max(cost.forward, 1):.3g}"
    if cost.is_high:
        price += f": {named(cost.whole)} cost as much as in full fine-tuning. docs/any_model.md says how to teach jpeft a layer"
    found = [*of_begin, of_learning, of_merge, Finding("cost", "BAD" if cost.is_high else "ok", f"{price}.")]
    fields = {
        "adapted": adapted,
        "added": added,
        "left": left,
        "dead": dead,
        "unread": unread,
        "begins": begins,
        "effect": effect,
        "merge": apart,
        "passes": cost.passes,
        "full_cost": cost.whole,
    }
    return [*found, *_coverage(adapted, added, left, unread)], fields


def _is_matrix(path: str, leaf: Any) -> bool:
    """Whether a parameter is a kernel or a table, and not a vector for each layer of a stack."""
    return leaf.ndim > 1 and path.rpartition("/")[2] not in ("bias", "scale")


def _begins(checked: Subject, base: Any, gradient: Callable[..., Any]) -> tuple[float | None, list[Finding]]:
    """Whether a new adapter leaves the outputs as they are, and can move."""
    method, params = checked.peft.method, checked.peft.params
    try:
        fresh = method.init(jax.random.key(0), params)
        grads, out = gradient(fresh, params)
    except (ValueError, TypeError):  # statistics that it must be given, or leaves whose number they decide
        return None, [Finding("begins", "-", "a new adapter takes statistics of data, so what it does was not looked at.")]
    far, promised = distance(out, base), promise(method)
    found = [Finding("begins", "-", f"a new adapter moves the outputs by {far:.1e} of their size; the method promises nothing.")]
    if promised is not None:
        bad = not far <= max(promised, tolerance(base, checked))
        text = f"a new adapter moves the outputs by {far:.1e} of their size"
        found = [Finding("begins", "BAD" if bad else "ok", f"{text}, but should leave them as they are." if bad else f"{text}.")]
    if checked.trained and not any(_largest(flatten(grads)[path]) > 0 for path in checked.trained):
        text = "no leaf of a new adapter has a gradient. Is an output layer all zeros, and not trained? Train it whole: head=REGEX."
        found.append(Finding("moves", "BAD", text))
    return far, found


def _learns(checked: Subject, grads: Any, effect: float) -> tuple[tuple[str, ...], Finding]:
    """Whether each trained leaf has a gradient where no leaf is zero."""
    paths, leaves = checked.trained, flatten(grads)
    dead = tuple(path for path in paths if not 0 < _largest(leaves[path]) < float("inf"))
    if dead:
        how = "have no gradient, or one that is no number"
        return dead, Finding("learns", "BAD", f"{len(dead)} of {len(paths)} leaves {how}, so they cannot learn: {named(dead)}.")
    if paths and not effect > 0:
        return dead, Finding("learns", "BAD", "noise on all leaves does not change the outputs.")
    return dead, Finding("learns", "ok", f"all {len(paths)} leaves have a gradient; noise on them moves the outputs by {effect:.1e}.")


def _largest(leaf: Any) -> float:
    return float(jnp.abs(leaf.astype(jnp.float32)).max()) if leaf.size else 1.0


def _merges(checked: Subject, run: Callable[..., Any], adapter: Any, out: Any) -> tuple[float | None, Finding]:
    """Whether merged parameters give the same outputs."""
    try:
        merged = merge(checked.peft.replace(adapter=adapter))
    except ValueError as error:
        return None, Finding("merges", "-", str(error))
    far = distance(run(merged), out)
    bad = not far <= tolerance(out, checked)
    text = f"merged and wrapped outputs are {far:.1e} of their size apart"
    return far, Finding("merges", "BAD" if bad else "ok", f"{text}, but should be equal." if bad else f"{text}.")


def _coverage(adapted: tuple[str, ...], added: tuple[str, ...], left: tuple[str, ...], unread: tuple[str, ...]) -> Iterator[Finding]:
    """What the method reaches, and what it does not."""
    if adapted:
        yield Finding("adapts", "-", f"{len(adapted)} parameters: {named(adapted)}.")
    if added:
        yield Finding("adds to", "-", f"{len(added)} modules: {named([path or '(the model)' for path in added])}.")
    if left:
        yield Finding("leaves", "-", f"{len(left)} kernels and tables: {named(left)}.")
    if unread:
        yield Finding("unread", "-", f"the model does not read {named(unread)} for these inputs.")


def promise(method: Method) -> float | None:
    """How far a new adapter may move the outputs, relative to them; None if the method promises nothing."""
    each = [part.begins_within for _, part in method.parts] or [method.begins_within]
    return None if None in each else max(bound for bound in each if bound is not None)


def distance(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest number; infinity for other structures or shapes."""
    pairs = list(zip(floats(found), floats(expected), strict=False))
    if len(floats(found)) != len(floats(expected)) or any(x.shape != y.shape for x, y in pairs):
        return float("inf")
    size = lambda x: float(jnp.abs(x.astype(jnp.float32)).max()) if x.size else 0.0
    apart = [size(x.astype(jnp.float32) - y.astype(jnp.float32)) / max(size(y), 1e-6) for x, y in pairs]
    return max(apart, default=0.0)


def tolerance(out: Any, checked: Subject) -> float:
    """What rounding may do, relative to the outputs: the coarsest type among outputs and parameters decides."""
    dtypes = [leaf.dtype for leaf in (*floats(out), *floats(checked.peft.params))]
    coarsest = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=1e-7)
    return 8 * coarsest if coarsest > 1e-4 else 2e-4
