"""What only chapters and their tests need: the ledger, and the style of figures."""
