"""What a model is asked to do: tables -> arrays, loss, metrics, predictions."""
