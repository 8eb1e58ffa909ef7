"""What only chapters and their tests need: the ledger, the style of figures, the comparison of outputs."""
