"""How any transformers model is run; for policies, and for the rooms that run one."""
