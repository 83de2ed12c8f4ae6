"""What each layer computes in: the rules, the search inside an error budget, and how a model is lowered."""
