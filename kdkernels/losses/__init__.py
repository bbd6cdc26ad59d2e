"""The public losses and their options: checks, the operators behind them, and their gradients."""
