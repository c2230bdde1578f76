"""What to do about parameters whose uses no interceptor can change."""

from jpeft.core.method import Method


def way_out(method: Method) -> str:
    """The advice of an error, without its full stop."""
    if method.why_no_merge is not None:
        return "Choose other parameters with target=, or another method"
    dense = "jpeft.wrap(lambda params, x: model.apply({'params': params}, x), host='dense')"
    return f"Choose other parameters with target=, or run the model on merged weights: {dense}"
