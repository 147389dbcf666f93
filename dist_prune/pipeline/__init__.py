"""Order, context, ledger and pre-flight checks of a run."""
