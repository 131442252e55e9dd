"""What adapters do: composition weights, size of the updates, loss without them, conditions in between."""
