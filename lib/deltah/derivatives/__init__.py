"""How derivatives are taken through any model; for `dynamics` and `kernels` alone."""
